//! The audit log: a JSON object per line, appended, never rewritten; the file of before is kept when it is full.
//!
//! Refusals are in a file of their own: who may do nothing can't push out what others did.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rswap_types::UnixMillis;
use serde::Serialize;
use serde_json::Value;

/// Longer arguments, and answers, are cut: those of people are a few names. Calls with more are refused, so only lessons are.
pub const TEXT_BYTES: usize = 4 << 10;

/// What is said of a call that was dropped before its end.
const DROPPED: &str = "the caller went away, or the agent stopped, before its end: see the agent's log";

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "said")]
pub enum Outcome {
    /// It is about to be carried out. A line without one that ends it: the agent ended before.
    Begun,
    /// The caller may not do this; nothing was done.
    Refused,
    /// It was carried out.
    Done,
    /// It failed, and why.
    Failed(String),
    /// Nobody has waited for the end.
    Unknown(String),
}

/// Who asked for something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Who {
    /// The user, if it was a process of this host.
    pub uid: Option<u32>,
    /// The process.
    pub pid: Option<i32>,
    /// Who else it was: a controller, a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    at: UnixMillis,
    /// Of a call, the same in both of its lines; unique in an agent's life.
    id: u64,
    #[serde(flatten)]
    who: &'a Who,
    call: &'a str,
    arguments: &'a Value,
    #[serde(flatten)]
    outcome: &'a Outcome,
}

/// The log.
#[derive(Clone, Debug)]
pub struct Audit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    next: AtomicU64,
    acts: Mutex<Log>,
    refusals: Mutex<Log>,
}

/// A file, and the one of before.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    limit_bytes: u64,
    file: File,
    /// Whether a line is on the disk before anything goes on.
    is_durable: bool,
}

/// A call that is under way. Dropped before its end, it is written down as one of unknown end.
#[derive(Debug)]
pub struct Entry {
    audit: Audit,
    id: u64,
    who: Who,
    call: String,
    arguments: Value,
    has_ended: bool,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)
}

/// `path` with `more` at its end.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(more);
    beside.into()
}

/// `text`, or the beginning of it.
fn cut(text: &str) -> String {
    if text.len() <= TEXT_BYTES {
        return text.to_owned();
    }
    let end = (0..=TEXT_BYTES).rev().find(|&end| text.is_char_boundary(end)).unwrap_or_default();
    format!("{}... ({} bytes)", &text[..end], text.len())
}

impl Audit {
    /// Opens the log at `path`, and that of refusals, `PATH.refused`; a file that is longer than `limit_bytes` is kept as
    /// `PATH.1`, and begun anew.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(path: PathBuf, limit_bytes: u64) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let log = |path: PathBuf, is_durable| -> io::Result<Mutex<Log>> {
            let file = open(&path)?;
            Ok(Mutex::new(Log { path, limit_bytes, file, is_durable }))
        };
        let refusals = log(beside(&path, ".refused"), false)?;
        Ok(Self(Arc::new(Shared { next: AtomicU64::new(1), acts: log(path, true)?, refusals })))
    }

    /// Writes that `who` asks for `call`, and may.
    ///
    /// # Errors
    /// It can't be written: nothing may be carried out.
    pub fn begin(&self, who: &Who, call: &str, given: &[u8]) -> io::Result<Entry> {
        // Lessons may be megabytes: they are not parsed for this.
        let parsed: Option<Value> =
            if given.len() <= TEXT_BYTES { serde_json::from_slice(given).ok() } else { None };
        let arguments = parsed.unwrap_or_else(|| Value::String(cut(&String::from_utf8_lossy(given))));
        let mut entry = Entry {
            audit: self.clone(),
            id: self.id(),
            who: who.clone(),
            call: cut(call),
            arguments,
            // Nothing has begun before that is written.
            has_ended: true,
        };
        self.write(&entry, &Outcome::Begun)?;
        entry.has_ended = false;
        Ok(entry)
    }

    /// Writes that `who` asks for `call`, and may not.
    ///
    /// # Errors
    /// It can't be written.
    pub fn refused(&self, who: &Who, call: &str) -> io::Result<()> {
        let call = cut(call);
        let line = Line {
            at: UnixMillis::now(),
            id: self.id(),
            who,
            call: &call,
            // Nobody has read them.
            arguments: &Value::Null,
            outcome: &Outcome::Refused,
        };
        append(&self.0.refusals, &line)
    }

    fn id(&self) -> u64 {
        self.0.next.fetch_add(1, Ordering::Relaxed)
    }

    fn write(&self, entry: &Entry, outcome: &Outcome) -> io::Result<()> {
        let Entry { id, who, call, arguments, .. } = entry;
        let line = Line { at: UnixMillis::now(), id: *id, who, call, arguments, outcome };
        append(&self.0.acts, &line)
    }
}

fn append(log: &Mutex<Log>, line: &Line<'_>) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    log.lock().unwrap_or_else(PoisonError::into_inner).append(bytes)
}

impl Log {
    fn append(&mut self, mut line: Vec<u8>) -> io::Result<()> {
        let Self { path, limit_bytes, file, is_durable } = self;
        if std::fs::metadata(&*path).map(|found| found.ino()).ok() != Some(file.metadata()?.ino()) {
            // Somebody else rotates it, or has removed it.
            *file = open(path)?;
        }
        let mut length = file.metadata()?.len();
        if length > 0 && length + line.len() as u64 > *limit_bytes {
            match std::fs::rename(&*path, beside(path, ".1")) {
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            *file = open(path)?;
            length = file.metadata()?.len();
        }
        let mut last = [b'\n'];
        if length > 0 && matches!(file.read_at(&mut last, length - 1), Ok(1)) && last != [b'\n'] {
            // Half a line, of an agent or a host that broke off, would swallow this one.
            line.insert(0, b'\n');
        }
        if let Err(error) = file.write_all(&line) {
            // What was written of it goes, as far as the disk lets it; else the next line begins on one of its own.
            let _ = file.set_len(length);
            return Err(error);
        }
        if *is_durable { file.sync_data() } else { Ok(()) }
    }
}

impl Entry {
    /// Writes what came of it.
    pub fn end(mut self, outcome: Outcome) {
        self.write_end(match outcome {
            Outcome::Failed(said) => Outcome::Failed(cut(&said)),
            other => other,
        });
    }

    fn write_end(&mut self, outcome: Outcome) {
        self.has_ended = true;
        if let Err(error) = self.audit.write(self, &outcome) {
            tracing::error!(%error, call = self.call, ?outcome, "the end of a call is not in the audit log");
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if !self.has_ended {
            self.write_end(Outcome::Unknown(DROPPED.to_owned()));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn caller() -> Who {
        Who { pid: Some(42), uid: Some(1000), peer: None }
    }

    #[test]
    fn a_call_is_there_before_it_is_carried_out_and_when_it_has_ended() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("log/audit.jsonl");
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        let entry = audit.begin(&caller(), "/v1/swap", br#"{ "instance" : "a" }"#).unwrap();
        let begun = lines(&path);
        assert_eq!(begun[0]["outcome"], "begun");
        assert_eq!(begun[0]["uid"], 1000);
        assert_eq!(begun[0]["pid"], 42);
        assert_eq!(begun[0]["arguments"]["instance"], "a");
        entry.end(Outcome::Failed("no\nsuch pool".into()));
        drop(audit.begin(&caller(), "/v1/drain", b"{\"not\" json").unwrap());
        let all = lines(&path);
        assert_eq!(all.len(), 4);
        assert_eq!((&all[1]["outcome"], &all[1]["said"]), (&"failed".into(), &"no\nsuch pool".into()));
        assert_eq!(all[1]["id"], all[0]["id"]);
        assert_eq!(all[2]["arguments"], "{\"not\" json");
        // One that nobody has ended.
        assert_eq!((&all[3]["outcome"], &all[3]["said"]), (&"unknown".into(), &DROPPED.into()));
        assert_eq!(all[3]["id"], all[2]["id"]);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!begun[0].as_object().unwrap().contains_key("peer"));
        // Another agent goes on with it.
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        audit.begin(&caller(), "/v1/swap", b"").unwrap().end(Outcome::Done);
        assert_eq!(lines(&path).len(), 6);
        let far = Who { peer: Some("the controller".to_owned()), ..Who::default() };
        audit.begin(&far, "order drain", b"{}").unwrap().end(Outcome::Done);
        assert_eq!(lines(&path)[6]["peer"], "the controller");
        assert_eq!(lines(&path)[6]["uid"], Value::Null);
    }

    #[test]
    fn refusals_are_in_a_file_of_their_own_and_push_out_nothing() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        let audit = Audit::open(path.clone(), 1 << 10).unwrap();
        audit.begin(&caller(), "/v1/swap", b"{}").unwrap().end(Outcome::Done);
        for _ in 0..100 {
            audit.refused(&caller(), "/v1/drain").unwrap();
        }
        let acts = lines(&path);
        assert_eq!(acts.len(), 2);
        assert_eq!(acts[1]["outcome"], "done");
        for path in [beside(&path, ".refused"), beside(&path, ".refused.1")] {
            assert!((1..=1 << 10).contains(&path.metadata().unwrap().len()));
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let refused = lines(&path);
            assert!(refused.iter().all(|line| line["outcome"] == "refused" && line["uid"] == 1000));
        }
    }

    #[test]
    fn half_a_line_does_not_swallow_the_next() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        std::fs::write(&path, "{}\n{\"at\":17").unwrap();
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        audit.begin(&caller(), "/v1/swap", b"{}").unwrap().end(Outcome::Done);
        let text = std::fs::read_to_string(&path).unwrap();
        let [_, half, begun, done] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert_eq!(half, "{\"at\":17");
        for (line, outcome) in [(begun, "begun"), (done, "done")] {
            assert_eq!(serde_json::from_str::<Value>(line).unwrap()["outcome"], outcome);
        }
    }

    #[test]
    fn a_full_one_is_kept_and_begun_anew_and_long_arguments_are_cut() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        let audit = Audit::open(path.clone(), 20_000).unwrap();
        let long = format!("{{\"text\":\"{}\"}}", "\u{e9}".repeat(100_000));
        for _ in 0..10 {
            drop(audit.begin(&caller(), "/v1/learn", long.as_bytes()).unwrap());
        }
        for path in [path.clone(), at.path().join("audit.jsonl.1")] {
            let length = path.metadata().unwrap().len();
            assert!((1..=20_000).contains(&length), "{length}");
            assert!(lines(&path).iter().all(|line| line["arguments"].as_str().unwrap().contains("bytes)")));
        }
        // Removed by somebody: the next line is not lost.
        std::fs::remove_file(&path).unwrap();
        audit.begin(&caller(), "/v1/swap", b"").unwrap().end(Outcome::Done);
        assert_eq!(lines(&path).len(), 2);
    }

    #[test]
    fn what_cannot_be_written_is_an_error() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(audit.begin(&caller(), "/v1/swap", b"").is_err());
    }
}
