//! The failure matrix of Redis under load.

use rswap_tests::{failure_matrix, subjects::Redis};

failure_matrix!(Redis, &[]);
