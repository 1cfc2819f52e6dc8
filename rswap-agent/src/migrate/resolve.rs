//! Asking the destination what became of a migration, and telling it that nothing is in doubt any more.

use std::io::{Read, Write};

use super::{
    MigrateError,
    journal::MigrationId,
    rules::Fate,
    wire::{self, Frame, Hello, Tag, WireError},
};

const DOING: &str = "asking for a migration's fate";

/// A conversation with a destination's agent, of questions only.
pub struct Inquiry<S> {
    stream: S,
}

impl<S: Read + Write> Inquiry<S> {
    /// Greets the agent at the other end of `stream`.
    pub fn begin(stream: S) -> Result<Self, MigrateError> {
        let mut inquiry = Self { stream };
        let hello = postcard::to_stdvec(&Hello::ours()).unwrap_or_default();
        let theirs = inquiry.ask(Tag::Hello, &hello, Tag::Hello)?;
        let theirs = postcard::from_bytes(&theirs).map_err(|_| broken("a malformed Hello".into()))?;
        wire::negotiate(&Hello::ours(), &theirs).map_err(broken)?;
        Ok(inquiry)
    }

    /// What became of `id`; the answer is written down there.
    pub fn fate(&mut self, id: MigrationId) -> Result<Fate, MigrateError> {
        let answer = self.ask(Tag::Inquire, &id.0.to_le_bytes(), Tag::Fate)?;
        let number = answer.first().copied().unwrap_or_default();
        Fate::from_number(number).ok_or_else(|| broken(format!("there is no fate {number}")))
    }

    /// Lets the destination forget `id`.
    pub fn settle(&mut self, id: MigrationId) -> Result<(), MigrateError> {
        self.ask(Tag::Settled, &id.0.to_le_bytes(), Tag::Settled).map(drop)
    }

    fn ask(&mut self, tag: Tag, payload: &[u8], answer: Tag) -> Result<Vec<u8>, MigrateError> {
        wire::write_frame(&mut self.stream, tag, payload).map_err(link)?;
        self.stream.flush().map_err(|error| link(error.into()))?;
        match wire::read_frame(&mut self.stream).map_err(link)? {
            Frame { tag, payload } if tag == answer => Ok(payload),
            Frame { tag: Tag::Abort, payload } => Err(MigrateError::Peer {
                doing: DOING,
                reason: String::from_utf8_lossy(&payload).into_owned(),
            }),
            Frame { tag, .. } => Err(broken(format!("{tag:?} came where {answer:?} was due"))),
        }
    }
}

fn broken(problem: String) -> MigrateError {
    MigrateError::Protocol { doing: DOING, problem }
}

fn link(error: WireError) -> MigrateError {
    match error {
        WireError::Io(source) => MigrateError::Link { doing: DOING, source },
        other => broken(other.to_string()),
    }
}
