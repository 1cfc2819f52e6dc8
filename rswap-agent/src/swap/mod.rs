//! Plan -> outcome on this host. Every swap has the same five steps: snapshot, transfer, activate,
//! verify, deactivate.
