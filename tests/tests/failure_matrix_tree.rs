//! The failure matrix of a tree of processes that checks itself.

use rswap_tests::{failure_matrix, subjects::Tree};

failure_matrix!(Tree, &[]);
