//! The scenario tests' harness: hosts as network namespaces, workloads, faults.
