//! A host as a pool: write tracking, delta codec, wire frames, source, destination, verify, journal.

pub mod linux_destination;
pub mod linux_source;
pub mod traits;

pub use traits::{DestinationTask, PAGE_SIZE, PageRange, SourceTask, TaskError, Written};
