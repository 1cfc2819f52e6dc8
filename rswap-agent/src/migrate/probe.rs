//! The question before an offer: what would the destination refuse? Nothing is made at either end.
//!
//! A source that only asks closes the link after the answer.

use std::io::{Read, Write};

use super::{
    MigrateError,
    offer::Objection,
    wire::{self, Hello, Tag, WireError},
};

const DOING: &str = "asking the destination";

/// Asks the destination behind `stream` what it would refuse of `requirements`.
pub fn ask(mut stream: impl Read + Write, requirements: &[u8]) -> Result<Vec<Objection>, MigrateError> {
    let hello = postcard::to_stdvec(&Hello::ours()).unwrap_or_default();
    wire::write_frame(&mut stream, Tag::Hello, &hello).map_err(wire_failed)?;
    stream.flush().map_err(|error| wire_failed(error.into()))?;
    let theirs = postcard::from_bytes(&expect(&mut stream, Tag::Hello)?)
        .map_err(|_| broken("a malformed Hello".into()))?;
    wire::negotiate(&Hello::ours(), &theirs).map_err(broken)?;
    wire::write_frame(&mut stream, Tag::Probe, requirements).map_err(wire_failed)?;
    stream.flush().map_err(|error| wire_failed(error.into()))?;
    let answer = expect(&mut stream, Tag::ProbeAnswer)?;
    postcard::from_bytes(&answer).map_err(|_| broken("a malformed answer".into()))
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
