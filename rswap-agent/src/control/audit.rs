//! The audit log: a JSON object per line, appended, never rewritten; the file of before is kept when it is full.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Serialize;
use serde_json::Value;

use super::gate::Caller;
use crate::units::UnixMillis;

/// Longer arguments, and answers, are cut: those of people are a few names.
const TEXT_BYTES: usize = 4 << 10;

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "said")]
pub(super) enum Outcome {
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

#[derive(Serialize)]
struct Line<'a> {
    at: UnixMillis,
    /// Of a call, the same in both of its lines; unique in an agent's life.
    id: u64,
    uid: Option<u32>,
    pid: Option<i32>,
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
    path: PathBuf,
    limit_bytes: u64,
    next: AtomicU64,
    file: Mutex<File>,
}

/// A call that is under way.
#[derive(Debug)]
pub(super) struct Entry {
    audit: Audit,
    id: u64,
    caller: Caller,
    call: String,
    arguments: Value,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
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
    /// Opens the log at `path`; a file that is longer than `limit_bytes` is kept as `PATH.1`, and begun anew.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(path: PathBuf, limit_bytes: u64) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let file = Mutex::new(open(&path)?);
        Ok(Self(Arc::new(Shared { path, limit_bytes, next: AtomicU64::new(1), file })))
    }

    /// Writes that `caller` asks for `call`, and whether it may.
    ///
    /// # Errors
    /// It can't be written: nothing may be carried out.
    pub(super) fn begin(&self, caller: &Caller, call: &str, given: &[u8], may: bool) -> io::Result<Entry> {
        let arguments = match serde_json::from_slice(given) {
            Ok(arguments) if given.len() <= TEXT_BYTES => arguments,
            _ => Value::String(cut(&String::from_utf8_lossy(given))),
        };
        let entry = Entry {
            audit: self.clone(),
            id: self.0.next.fetch_add(1, Ordering::Relaxed),
            caller: caller.clone(),
            call: cut(call),
            arguments,
        };
        self.write(&entry, if may { &Outcome::Begun } else { &Outcome::Refused })?;
        Ok(entry)
    }

    fn write(&self, entry: &Entry, outcome: &Outcome) -> io::Result<()> {
        let Entry { id, caller, call, arguments, .. } = entry;
        let (uid, pid) = (caller.uid, caller.pid);
        let line = Line { at: UnixMillis::now(), id: *id, uid, pid, call, arguments, outcome };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        let Shared { path, limit_bytes, file, .. } = &*self.0;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let length = file.metadata()?.len();
        if length > 0 && length + bytes.len() as u64 > *limit_bytes {
            let mut before = path.as_os_str().to_owned();
            before.push(".1");
            std::fs::rename(path, before)?;
            *file = open(path)?;
        } else if std::fs::metadata(path).map(|found| found.ino()).ok() != Some(file.metadata()?.ino()) {
            // Somebody else rotates it, or has removed it.
            *file = open(path)?;
        }
        file.write_all(&bytes)?;
        file.sync_data()
    }
}

impl Entry {
    /// Writes what came of it.
    pub(super) fn end(self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Failed(said) => Outcome::Failed(cut(&said)),
            other => other,
        };
        if let Err(error) = self.audit.write(&self, &outcome) {
            tracing::error!(%error, call = self.call, ?outcome, "the end of a call is not in the audit log");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn caller() -> Caller {
        Caller { pid: Some(42), uid: Some(1000), gids: vec![100] }
    }

    #[test]
    fn a_call_is_there_before_it_is_carried_out_and_when_it_has_ended() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("log/audit.jsonl");
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        let entry = audit.begin(&caller(), "/v1/swap", br#"{"instance":"a"}"#, true).unwrap();
        let begun = lines(&path);
        assert_eq!(begun[0]["outcome"], "begun");
        assert_eq!(begun[0]["uid"], 1000);
        assert_eq!(begun[0]["pid"], 42);
        assert_eq!(begun[0]["arguments"]["instance"], "a");
        entry.end(Outcome::Failed("no\nsuch pool".into()));
        drop(audit.begin(&caller(), "/v1/drain", b"{\"not\" json", false).unwrap());
        let all = lines(&path);
        assert_eq!(all.len(), 3);
        assert_eq!((&all[1]["outcome"], &all[1]["said"]), (&"failed".into(), &"no\nsuch pool".into()));
        assert_eq!(all[1]["id"], all[0]["id"]);
        assert_eq!(all[2]["outcome"], "refused");
        assert_eq!(all[2]["arguments"], "{\"not\" json");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        // Another agent goes on with it.
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        drop(audit.begin(&caller(), "/v1/swap", b"", true).unwrap());
        assert_eq!(lines(&path).len(), 4);
    }

    #[test]
    fn a_full_one_is_kept_and_begun_anew_and_long_arguments_are_cut() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        let audit = Audit::open(path.clone(), 20_000).unwrap();
        let long = format!("{{\"text\":\"{}\"}}", "\u{e9}".repeat(100_000));
        for _ in 0..10 {
            drop(audit.begin(&caller(), "/v1/learn", long.as_bytes(), true).unwrap());
        }
        for path in [path.clone(), at.path().join("audit.jsonl.1")] {
            let length = path.metadata().unwrap().len();
            assert!((1..=20_000).contains(&length), "{length}");
            assert!(lines(&path).iter().all(|line| line["arguments"].as_str().unwrap().contains("bytes)")));
        }
        // Removed by somebody: the next line is not lost.
        std::fs::remove_file(&path).unwrap();
        drop(audit.begin(&caller(), "/v1/swap", b"", true).unwrap());
        assert_eq!(lines(&path).len(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_an_error() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("audit.jsonl");
        let audit = Audit::open(path.clone(), 1 << 20).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(audit.begin(&caller(), "/v1/swap", b"", true).is_err());
    }
}
