//! A host as a pool: write tracking, delta codec, wire frames, source, destination, verify, journal.
