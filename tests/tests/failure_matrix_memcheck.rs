//! The failure matrix of a program of several threads that checks its memory.

use rswap_tests::{failure_matrix, subjects::Memcheck};

failure_matrix!(Memcheck, &[]);
