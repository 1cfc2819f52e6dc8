//! Several system calls of a stub between two of its stops: a stop costs more than most calls.
//!
//! The stub runs a loop over a list in its scratch memory, which ends at the first call that fails, and in a breakpoint. Only
//! stubs do so: a program that loses its tracer has to come back by itself, call by call (see [`remote`](super::remote)).

use std::io;

use super::{TraceeError, remote::Remote};
use crate::sys::mem::PAGE_SIZE;

/// The loop: `%rbx` is the next call, `%rbp` the end of the list.
pub(super) const CODE: &[u8] = &[
    0x48, 0x39, 0xeb, // next: cmp %rbp, %rbx
    0x73, 0x3b, // jae end
    0x48, 0x8b, 0x03, // mov (%rbx), %rax
    0x48, 0x8b, 0x7b, 0x08, // mov 8(%rbx), %rdi
    0x48, 0x8b, 0x73, 0x10, // mov 16(%rbx), %rsi
    0x48, 0x8b, 0x53, 0x18, // mov 24(%rbx), %rdx
    0x4c, 0x8b, 0x53, 0x20, // mov 32(%rbx), %r10
    0x4c, 0x8b, 0x43, 0x28, // mov 40(%rbx), %r8
    0x4c, 0x8b, 0x4b, 0x30, // mov 48(%rbx), %r9
    0x0f, 0x05, // syscall
    0x48, 0x89, 0x43, 0x38, // mov %rax, 56(%rbx)
    0x48, 0x8b, 0x4b, 0x40, // mov 64(%rbx), %rcx
    0x48, 0x89, 0x01, // mov %rax, (%rcx)
    0x48, 0x8b, 0x4b, 0x48, // mov 72(%rbx), %rcx
    0x48, 0x89, 0x01, // mov %rax, (%rcx)
    0x48, 0x83, 0xc3, 0x50, // add $80, %rbx
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, // cmp $-4095, %rax
    0x72, 0xc0, // jb next
    0xcc, // end: int3
];

/// A call in the list, in words: number, six arguments, result, and two places that the result is written to as well.
const ENTRY_WORDS: usize = 8 + PLACES;
const ENTRY_BYTES: usize = ENTRY_WORDS * 8;
const RESULT: usize = 56;
/// In how many later calls of the same list the result of a call can be an argument.
const PLACES: usize = 2;

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A number.
    Plain(u64),
    /// The address of these bytes.
    Data(&'a [u8]),
    /// What an earlier call of the same batch returned.
    ResultOf(Ticket),
}

impl From<u64> for Arg<'_> {
    fn from(value: u64) -> Self {
        Self::Plain(value)
    }
}

impl From<i32> for Arg<'_> {
    /// Sign-extended, as C does it.
    fn from(value: i32) -> Self {
        Self::Plain(i64::from(value) as u64)
    }
}

/// A call of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(usize);

/// Calls that wait to be made together, in their order; none follows one that fails.
///
/// What is not [run](Self::run) is not made.
#[must_use]
pub struct Batch<'a> {
    remote: &'a mut Remote,
    waiting: Vec<Waiting>,
    /// The scratch memory's contents: the list from its beginning on, data from its end backwards.
    page: Vec<u8>,
    data_from: usize,
    /// Results of the calls that were made.
    results: Vec<u64>,
}

struct Waiting {
    name: &'static str,
    /// In how many later ones its result is an argument.
    uses: usize,
}

impl<'a> Batch<'a> {
    /// A batch without calls.
    pub fn new(remote: &'a mut Remote) -> Self {
        let page = vec![0; PAGE_SIZE as usize];
        Self { remote, waiting: Vec::new(), data_from: page.len(), page, results: Vec::new() }
    }

    /// Adds the call `number`, named `name` in errors; arguments that are not given are 0. Makes those that wait, if there is
    /// no more room.
    ///
    /// # Errors
    /// A call that waited failed.
    pub fn call(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        args: &[Arg<'_>],
    ) -> Result<Ticket, TraceeError> {
        debug_assert!(args.len() <= 6, "{name}");
        let data = args
            .iter()
            .map(|arg| if let Arg::Data(bytes) = arg { room_for(bytes) } else { 0 })
            .sum::<usize>();
        let is_used_up = |arg: &Arg<'_>| match arg {
            Arg::ResultOf(call) => self.position(*call).is_some_and(|at| self.waiting[at].uses == PLACES),
            _ => false,
        };
        if (self.waiting.len() + 1) * ENTRY_BYTES + data > self.data_from || args.iter().any(is_used_up) {
            self.make()?;
        }
        if (self.waiting.len() + 1) * ENTRY_BYTES + data > self.data_from {
            let text =
                format!("{name}: {data} bytes don't fit the scratch memory of process {}", self.remote.tid());
            return Err(TraceeError::Unsupported(text));
        }
        let at = self.waiting.len();
        let entry = at * ENTRY_BYTES;
        self.put(entry, number as u64);
        for place in 0..PLACES {
            // Where nobody asks for it, it is written to its own place again.
            let nowhere = self.address(entry + RESULT);
            self.put(entry + RESULT + 8 + place * 8, nowhere);
        }
        for (place, arg) in (entry + 8..).step_by(8).zip(args) {
            let value = match *arg {
                Arg::Plain(value) => value,
                Arg::Data(bytes) => {
                    self.data_from -= room_for(bytes);
                    self.page[self.data_from..][..bytes.len()].copy_from_slice(bytes);
                    self.address(self.data_from)
                }
                Arg::ResultOf(call) => self.result_to(call, place),
            };
            self.put(place, value);
        }
        // What an earlier list had in the others.
        for place in (entry + 8..entry + RESULT).step_by(8).skip(args.len()) {
            self.put(place, 0);
        }
        self.waiting.push(Waiting { name, uses: 0 });
        Ok(Ticket(self.results.len() + at))
    }

    /// The result of an earlier call; if that waits, 0, which it will replace at `place`.
    fn result_to(&mut self, call: Ticket, place: usize) -> u64 {
        let Some(at) = self.position(call) else { return self.results[call.0] };
        let uses = &mut self.waiting[at].uses;
        let told = at * ENTRY_BYTES + RESULT + 8 + *uses * 8;
        *uses += 1;
        let here = self.address(place);
        self.put(told, here);
        0
    }

    /// Makes the calls. Returns the last one's result.
    ///
    /// # Errors
    /// One failed; those behind it were not made.
    pub fn run(mut self) -> Result<u64, TraceeError> {
        self.make()?;
        Ok(self.results.last().copied().unwrap_or_default())
    }

    fn make(&mut self) -> Result<(), TraceeError> {
        let waiting = std::mem::take(&mut self.waiting);
        self.data_from = self.page.len();
        if waiting.is_empty() {
            return Ok(());
        }
        let calls = waiting.len();
        let made = self.remote.run_list(&self.page, (calls * ENTRY_BYTES) as u64)?;
        for (entry, call) in made.chunks_exact(ENTRY_BYTES).zip(&waiting) {
            let result = entry[RESULT..].first_chunk().map_or(0, |bytes| i64::from_ne_bytes(*bytes));
            if (-4095..0).contains(&result) {
                let source = io::Error::from_raw_os_error(-result as i32);
                return Err(TraceeError::Remote { call: call.name, pid: self.remote.tid(), source });
            }
            self.results.push(result as u64);
        }
        match made.len() == calls * ENTRY_BYTES {
            true => Ok(()),
            false => Err(TraceeError::Unsupported(format!("process {} lost calls", self.remote.tid()))),
        }
    }

    /// The place in the list of a call that waits.
    fn position(&self, ticket: Ticket) -> Option<usize> {
        ticket.0.checked_sub(self.results.len())
    }

    fn address(&self, offset: usize) -> u64 {
        self.remote.list_at() + offset as u64
    }

    fn put(&mut self, offset: usize, word: u64) {
        self.page[offset..][..8].copy_from_slice(&word.to_ne_bytes());
    }
}

/// Data begins at multiples of eight bytes.
fn room_for(bytes: &[u8]) -> usize {
    bytes.len().next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        process::{Child, Command},
    };

    use super::*;
    use crate::sys::ptrace;

    /// A process that is ready to make calls.
    fn stub() -> (Child, Remote) {
        let child = Command::new("sleep").arg("60").spawn().expect("sleep starts");
        let pid = child.id() as i32;
        ptrace::seize_stub(pid).expect("a child can be traced");
        ptrace::interrupt(pid).expect("a tracee can be stopped");
        while ptrace::wait_stop(pid).expect("it can be waited for") != ptrace::Stop::Event {
            ptrace::resume(pid, 0).expect("it goes on");
        }
        let mut remote = Remote::stub(pid).expect("a stub");
        remote.keep_changes();
        remote.map_scratch(0x1_0000).expect("nobody maps so low");
        (child, remote)
    }

    fn name_of(child: &Child) -> String {
        fs::read_to_string(format!("/proc/{}/comm", child.id())).expect("it lives").trim().to_owned()
    }

    fn open_files(child: &Child) -> Vec<(i32, String)> {
        let mut open = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", child.id())).expect("it lives").flatten() {
            let target = fs::read_link(entry.path()).expect("it stands still").to_string_lossy().into_owned();
            open.push((entry.file_name().to_str().unwrap().parse().unwrap(), target));
        }
        open.sort();
        open
    }

    fn name<'a>(name: &'a str, bytes: &'a mut Vec<u8>) -> [Arg<'a>; 2] {
        *bytes = [name.as_bytes(), &[0]].concat();
        [libc::PR_SET_NAME.into(), Arg::Data(bytes)]
    }

    #[test]
    fn a_result_is_an_argument_of_later_calls() {
        let (mut child, mut remote) = stub();
        let before = open_files(&child);
        let mut batch = remote.batch();
        let args = [libc::AT_FDCWD.into(), Arg::Data(b"/dev/null\0"), libc::O_RDONLY.into()];
        let file = Arg::ResultOf(batch.call("openat", libc::SYS_openat, &args).unwrap());
        for number in [50, 51, 52] {
            batch.call("dup3", libc::SYS_dup3, &[file, number.into()]).unwrap();
        }
        batch.call("close", libc::SYS_close, &[file]).unwrap();
        batch.run().unwrap();
        let fresh: Vec<_> = open_files(&child).into_iter().filter(|file| !before.contains(file)).collect();
        assert_eq!(fresh, [50, 51, 52].map(|number| (number, "/dev/null".to_owned())));
        child.kill().unwrap();
    }

    #[test]
    fn more_calls_than_fit_one_list_are_made_in_their_order() {
        let (mut child, mut remote) = stub();
        let mut batch = remote.batch();
        for number in 0..500 {
            let mut bytes = Vec::new();
            batch.call("prctl", libc::SYS_prctl, &name(&format!("number {number}"), &mut bytes)).unwrap();
        }
        let pid = batch.call("getpid", libc::SYS_getpid, &[]).map(Arg::ResultOf).unwrap();
        assert!(matches!(pid, Arg::ResultOf(Ticket(500))));
        assert_eq!(batch.run().unwrap(), u64::from(child.id()));
        assert_eq!(name_of(&child), "number 499");
        child.kill().unwrap();
    }

    #[test]
    fn nothing_follows_a_call_that_fails() {
        let (mut child, mut remote) = stub();
        let mut batch = remote.batch();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        batch.call("prctl", libc::SYS_prctl, &name("before", &mut first)).unwrap();
        batch.call("chdir", libc::SYS_chdir, &[Arg::Data(b"/is/not/there\0")]).unwrap();
        batch.call("prctl", libc::SYS_prctl, &name("behind", &mut second)).unwrap();
        match batch.run() {
            Err(TraceeError::Remote { call: "chdir", source, .. }) => {
                assert_eq!(source.raw_os_error(), Some(libc::ENOENT));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(name_of(&child), "before");
        // It makes calls as before.
        assert_eq!(remote.batch().run().unwrap(), 0);
        assert_eq!(remote.call("getpid", libc::SYS_getpid, [0; 6]).unwrap(), u64::from(child.id()));
        child.kill().unwrap();
    }

    #[test]
    fn data_that_does_not_fit_is_refused() {
        let (mut child, mut remote) = stub();
        let mut batch = remote.batch();
        let args = [libc::PR_SET_NAME.into(), Arg::Data(&[b'x'; PAGE_SIZE as usize])];
        let refused = batch.call("prctl", libc::SYS_prctl, &args);
        assert!(matches!(refused, Err(TraceeError::Unsupported(_))), "{refused:?}");
        child.kill().unwrap();
    }
}
