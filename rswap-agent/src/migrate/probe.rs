//! Short conversations beside a migration's own: the question before an offer, what would the destination refuse, after which
//! nothing has been made at either end; and a further connection that joins a migration.
//!
//! A source that only asks closes the link after the answer.

use std::io::{Read, Write};

use super::{
    MigrateError,
    journal::MigrationId,
    offer::Objection,
    wire::{self, Hello, Tag, WireError},
};

const DOING: &str = "asking the destination";

/// Asks the destination behind `stream` what it would refuse of `requirements`.
pub fn ask(mut stream: impl Read + Write, requirements: &[u8]) -> Result<Vec<Objection>, MigrateError> {
    greet(&mut stream)?;
    send(&mut stream, Tag::Probe, requirements)?;
    let answer = expect(&mut stream, Tag::ProbeAnswer)?;
    postcard::from_bytes(&answer).map_err(|_| broken("a malformed answer".into()))
}

/// Makes `stream` the lane of this `number` of a migration that the destination has accepted.
pub(super) fn join(
    stream: &mut (impl Read + Write),
    id: MigrationId,
    number: u8,
) -> Result<(), MigrateError> {
    // Both at once: the way is long. The other speaks our version, or nothing would have been accepted.
    hello(stream)?;
    send(stream, Tag::Join, &wire::write_join(id, number))?;
    their_hello(stream)?;
    let accepted = expect(stream, Tag::Accept)?;
    match wire::parse_id(Tag::Accept, &accepted) {
        Ok(accepted) if accepted == id => Ok(()),
        _ => Err(broken("another migration was joined".into())),
    }
}

fn greet(stream: &mut (impl Read + Write)) -> Result<(), MigrateError> {
    hello(stream)?;
    their_hello(stream)
}

fn hello(stream: &mut impl Write) -> Result<(), MigrateError> {
    send(stream, Tag::Hello, &postcard::to_stdvec(&Hello::ours()).unwrap_or_default())
}

fn their_hello(stream: &mut impl Read) -> Result<(), MigrateError> {
    let theirs =
        postcard::from_bytes(&expect(stream, Tag::Hello)?).map_err(|_| broken("a malformed Hello".into()))?;
    wire::negotiate(&Hello::ours(), &theirs).map(drop).map_err(broken)
}

fn send(stream: &mut impl Write, tag: Tag, payload: &[u8]) -> Result<(), MigrateError> {
    wire::write_frame(stream, tag, payload).map_err(wire_failed)?;
    stream.flush().map_err(|error| wire_failed(error.into()))
}

/// As many of them as a frame holds: thousands of files may differ.
pub(super) fn encoded(mut objections: Vec<Objection>) -> Vec<u8> {
    loop {
        let bytes = postcard::to_stdvec(&objections).unwrap_or_default();
        if bytes.len() <= Tag::ProbeAnswer.limit() {
            return bytes;
        }
        let half = objections.len() / 2;
        let left_out = objections.len() - half;
        objections.truncate(half);
        objections.push(Objection::new("and more", format!("{left_out} others are left out")));
    }
}

fn expect(stream: &mut impl Read, tag: Tag) -> Result<Vec<u8>, MigrateError> {
    let frame = wire::read_frame(stream).map_err(wire_failed)?;
    match frame.tag {
        got if got == tag => Ok(frame.payload),
        Tag::Abort => {
            let reason = String::from_utf8_lossy(&frame.payload).into_owned();
            Err(MigrateError::Peer { doing: DOING, reason })
        }
        got => Err(broken(format!("{got:?} came where {tag:?} was due"))),
    }
}

fn broken(problem: String) -> MigrateError {
    MigrateError::Protocol { doing: DOING, problem }
}

fn wire_failed(error: WireError) -> MigrateError {
    match error {
        WireError::Io(source) => MigrateError::Link { doing: DOING, source },
        other => broken(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_always_fits_its_frame() {
        let many = (0..40_000).map(|n| Objection::new(format!("/usr/lib/file-{n}"), "differs")).collect();
        let bytes = encoded(many);
        assert!(bytes.len() <= Tag::ProbeAnswer.limit());
        let kept: Vec<Objection> = postcard::from_bytes(&bytes).expect("whole");
        assert!(kept.len() > 1000 && kept.last().is_some_and(|last| last.item == "and more"));
    }
}
