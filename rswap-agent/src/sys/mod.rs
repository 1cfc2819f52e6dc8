//! All unsafe code and raw system calls.
