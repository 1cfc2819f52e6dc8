//! What brings a thread back that loses its tracer in the middle of a foreign call.
//!
//! ```text
//! stack pointer --> | (address of pop %rax; ret | 15)       only without a restorer
//!        frame  --> | address of the restorer               mov $15, %eax; syscall
//!                   | context: registers, signal mask       as rt_sigreturn(2) takes it
//!                   | note                                  by which another agent knows the frame
//!                   | xsave area
//! ```
//!
//! A foreign call is made by a `syscall; ret` that the program has somewhere, on a stack where this lies ready. Without a
//! tracer the thread makes the call, returns into the restorer, and the kernel puts it back where it was, as after a
//! signal's handler. The frame is written before the registers are changed for the first time, and the registers before the
//! signal mask.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use super::{TraceeError, layout::Mapping};
use crate::sys::{
    mem::{self, PAGE_SIZE, RemoteAddr},
    ptrace::{self, Registers},
    xsave,
};

/// Most that a frame takes, AMX's tiles included.
pub(super) const AREA_BYTES: u64 = 3 * PAGE_SIZE;
/// Most of a stack that is searched for a frame: one may be as large as its program likes.
const SEARCHED: u64 = 16 << 20;
/// What the ABI lets a function use below its stack pointer.
const RED_ZONE: u64 = 128;
/// The segment of 64-bit code.
const CODE_SEGMENT: u64 = 0x33;

/// Distances in `struct rt_sigframe` (arch/x86/include/asm/sigframe.h).
const CONTEXT: usize = 48;
const NOTE: usize = 312;
const FRAME_BYTES: usize = 440;
/// The kernel keeps the context's `uc_flags` for these: an xsave area, and the stack's segment.
const FLAGS: u64 = 1 | 2 | 4;
/// No mode of an alternate stack: the kernel leaves it as it is (`do_sigaltstack` in kernel/signal.c).
const KEEP_ALTERNATE_STACK: u32 = 7;

/// `struct _fpx_sw_bytes` lies here in the area, which ends with the second number (asm/sigcontext.h).
const XSAVE_NOTE: usize = 464;
const XSAVE_BEGINS: u32 = 0x4650_5853;
const XSAVE_ENDS: u32 = 0x4650_5845;
const XSAVE_PRESENT: usize = 512;

/// By what the frame is known.
const MAGIC: [u8; 16] = *b"rswap lifeline\x00\x01";
const NOTE_BYTES: usize = 48;

const CALL: &[u8] = &[0x0f, 0x05, 0xc3];
const RESTORERS: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];
const POP: &[u8] = &[0x58, 0xc3];

/// Instructions of the program that a foreign call and the way back from it need, by their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ways {
    /// `syscall; ret`.
    pub(super) call: u64,
    back: Back,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Back {
    /// What libraries return to from signal handlers.
    Restorer(u64),
    /// `pop %rax; ret`.
    Pop(u64),
}

/// Where a file's code has them, from the file's beginning.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    call: Option<u64>,
    restorer: Option<u64>,
    pop: Option<u64>,
}

/// A mapped file's name, inode and offset, and the length of the mapping.
type Key = (String, u64, u64, u64);

fn key(mapping: &Mapping) -> Key {
    (mapping.name.clone(), mapping.inode, mapping.offset, mapping.len())
}

/// The places that were found before.
static KNOWN: Mutex<BTreeMap<Key, Places>> = Mutex::new(BTreeMap::new());

impl Ways {
    /// Looks for them in the code that `pid` has mapped. The first look into a file takes longer.
    pub(super) fn find(pid: i32, mappings: &[Mapping]) -> Result<Self, TraceeError> {
        // Not code that the program has made itself: it may be other code a moment later.
        let is_code = |mapping: &&Mapping| mapping.protection & libc::PROT_EXEC != 0 && mapping.is_file();
        let mut code: Vec<&Mapping> = mappings.iter().filter(is_code).collect();
        code.sort_by_key(|mapping| !(mapping.name.contains("libc") || mapping.name.contains("musl")));
        let mut found = Places::default();
        for mapping in &code {
            let places = places(pid, mapping);
            found.call = found.call.or(places.call);
            found.restorer = found.restorer.or(places.restorer);
            found.pop = found.pop.or(places.pop);
            if let (Some(call), Some(restorer)) = (found.call, found.restorer) {
                return Ok(Self { call, back: Back::Restorer(restorer) });
            }
        }
        match found {
            Places { call: Some(call), pop: Some(pop), .. } => Ok(Self { call, back: Back::Pop(pop) }),
            _ => {
                // It may have become another program meanwhile, whose code was read in place of this one's: the next look is
                // a fresh one.
                let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
                for mapping in &code {
                    known.remove(&key(mapping));
                }
                Err(TraceeError::Unsupported(format!(
                    "process {pid} has no code by which it would come back from a call if the agent were killed in it"
                )))
            }
        }
    }

    /// The words that lie below the frame, and its first one.
    fn chain(&self) -> (Vec<u64>, u64) {
        match self.back {
            Back::Restorer(at) => (Vec::new(), at),
            Back::Pop(at) => (vec![at, libc::SYS_rt_sigreturn as u64], self.call),
        }
    }

    fn back(&self) -> u64 {
        match self.back {
            Back::Restorer(at) | Back::Pop(at) => at,
        }
    }
}

/// The places in one mapping, as addresses.
fn places(pid: i32, mapping: &Mapping) -> Places {
    let key = key(mapping);
    let at = |place: u64| mapping.start + place;
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
    let holds = |place: Option<u64>, codes: &[&[u8]]| {
        place.is_none_or(|place| {
            let mut found = [0; 9];
            let read = mem::read(pid, RemoteAddr(at(place)), &mut found).unwrap_or(0);
            codes.iter().any(|code| read >= code.len() && found.starts_with(code))
        })
    };
    let places = match known {
        // The file may be another one by now.
        Some(known)
            if holds(known.call, &[CALL])
                && holds(known.restorer, &RESTORERS)
                && holds(known.pop, &[POP]) =>
        {
            known
        }
        _ => {
            let (fresh, is_all) = search(pid, mapping);
            // What could not be read of a process that is just ending says nothing about the next one.
            if is_all {
                KNOWN.lock().unwrap_or_else(PoisonError::into_inner).insert(key, fresh);
            }
            fresh
        }
    };
    Places { call: places.call.map(at), restorer: places.restorer.map(at), pop: places.pop.map(at) }
}

/// Also answers whether that is all there is to be known.
fn search(pid: i32, mapping: &Mapping) -> (Places, bool) {
    const CHUNK: usize = 256 * 1024;
    /// Of the instructions that are looked for, in bytes.
    const LONGEST: usize = 9;
    let mut found = Places::default();
    let mut chunk = vec![0; CHUNK];
    let mut at = mapping.start;
    while found.call.is_none() || found.restorer.is_none() {
        let want = (mapping.end - at).min(CHUNK as u64) as usize;
        let read = mem::read(pid, RemoteAddr(at), &mut chunk[..want]).unwrap_or(0);
        for (place, code) in chunk[..read].windows(LONGEST).enumerate() {
            let place = at - mapping.start + place as u64;
            match code[0] {
                0x0f if code.starts_with(CALL) => found.call = found.call.or(Some(place)),
                0x58 if code.starts_with(POP) => found.pop = found.pop.or(Some(place)),
                0x48 | 0xb8 if RESTORERS.iter().any(|restorer| code.starts_with(restorer)) => {
                    found.restorer = found.restorer.or(Some(place));
                }
                _ => {}
            }
        }
        if read < want {
            return (found, false);
        }
        if at + want as u64 == mapping.end {
            break;
        }
        // What lies across the border is found with the next chunk.
        at += (CHUNK - (LONGEST - 1)) as u64;
    }
    (found, true)
}

/// A frame that lies ready in a stopped thread's memory.
#[derive(Debug)]
pub(super) struct Lifeline {
    tid: i32,
    ways: Ways,
    /// The stack pointer for foreign calls.
    entry: u64,
    /// What was there before.
    before: Vec<(u64, Vec<u8>)>,
}

impl Lifeline {
    /// Writes the frame from which thread `tid` comes back to `context` and `mask`, to `area`.
    pub(super) fn lay(
        tid: i32,
        ways: Ways,
        area: std::ops::Range<u64>,
        context: &Registers,
        mask: u64,
    ) -> Result<Self, TraceeError> {
        if context.cs != CODE_SEGMENT {
            return Err(TraceeError::Unsupported(format!(
                "thread {tid} runs 32-bit code, which is not carried"
            )));
        }
        let state = ptrace::extended_state(tid).map_err(TraceeError::call("PTRACE_GETREGSET", tid))?;
        let (chain, first) = ways.chain();
        let frame = area.start + 16;
        let entry = frame - chain.len() as u64 * 8;
        let xsave_at = (frame + FRAME_BYTES as u64).next_multiple_of(64);
        let mut bytes: Vec<u8> = chain.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(context_bytes(first, frame, xsave_at, context, mask, &ways));
        bytes.resize((xsave_at - entry) as usize, 0);
        let (xsave, second_end) = xsave_area(&state);
        bytes.extend(xsave);
        let mut parts = vec![(entry, bytes)];
        // Where the kernel looks for the end depends on whether the thread has ever used what it must ask for, which nobody
        // can see: it may look in either place.
        if let Some(bytes) = second_end.filter(|bytes| xsave_at + *bytes as u64 + 4 <= area.end) {
            parts.push((xsave_at + bytes as u64, XSAVE_ENDS.to_ne_bytes().to_vec()));
        }
        let mut before = Vec::with_capacity(parts.len());
        for (at, bytes) in &parts {
            if at + bytes.len() as u64 > area.end {
                return Err(TraceeError::Unsupported(format!("thread {tid} has no room for its own state")));
            }
            let mut old = vec![0; bytes.len()];
            mem::read_exact(tid, RemoteAddr(*at), &mut old)
                .map_err(TraceeError::call("reading a stack", tid))?;
            before.push((*at, old));
        }
        for (at, bytes) in &parts {
            mem::write(tid, RemoteAddr(*at), bytes).map_err(TraceeError::call("writing to a stack", tid))?;
        }
        Ok(Self { tid, ways, entry, before })
    }

    /// `registers`, changed so that the thread does nothing but come back.
    pub(super) fn back(&self, registers: &Registers) -> Registers {
        // No call is interrupted any more: how it goes on is in the frame.
        Registers { rip: self.ways.call + 2, rsp: self.entry, orig_rax: !0, ..*registers }
    }

    /// `registers`, changed so that the thread makes a call, and comes back.
    pub(super) fn call(&self, registers: &Registers, number: u64, args: [u64; 6]) -> Registers {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let back = self.back(registers);
        Registers { rip: self.ways.call, rax: number, rdi, rsi, rdx, r10, r8, r9, ..back }
    }

    /// The instructions that it uses.
    pub(super) fn ways(&self) -> Ways {
        self.ways
    }

    /// Takes it away; the thread has its own registers again.
    pub(super) fn clear(&self) -> Result<(), TraceeError> {
        for (at, bytes) in &self.before {
            mem::write(self.tid, RemoteAddr(*at), bytes)
                .map_err(TraceeError::call("putting a stack's bytes back", self.tid))?;
        }
        Ok(())
    }
}

/// The frame without its xsave area.
fn context_bytes(first: u64, at: u64, xsave_at: u64, r: &Registers, mask: u64, ways: &Ways) -> Vec<u8> {
    // The restorer's address, flags, no further context; an alternate stack that the kernel takes for nonsense.
    let mut bytes: Vec<u8> = [first, FLAGS, 0, 0, u64::from(KEEP_ALTERNATE_STACK), 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    debug_assert_eq!(bytes.len(), CONTEXT);
    // `struct sigcontext_64`.
    for word in [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax,
        r.rcx, r.rsp, r.rip, r.eflags,
    ] {
        bytes.extend(word.to_ne_bytes());
    }
    for segment in [r.cs, 0, 0, r.ss] {
        bytes.extend((segment as u16).to_ne_bytes());
    }
    // Error, trap, old mask, address; the xsave area.
    for word in [0, 0, mask, 0, xsave_at] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend([0; 64]);
    bytes.extend(mask.to_ne_bytes());
    debug_assert_eq!(bytes.len(), NOTE);
    bytes.extend(MAGIC);
    for word in [at, ways.call, ways.back(), 0] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.resize(FRAME_BYTES, 0);
    bytes
}

/// A thread's extended state as signal frames have it; and where else the kernel may look for its end.
fn xsave_area(state: &[u8]) -> (Vec<u8>, Option<usize>) {
    let word = |at: usize| {
        state.get(at..).and_then(|bytes| bytes.first_chunk()).map(|bytes| u64::from_ne_bytes(*bytes))
    };
    let (Some(features), Some(present)) = (word(XSAVE_NOTE), word(XSAVE_PRESENT)) else {
        // A processor without xsave: x87 and SSE, and nothing else to say.
        return (state.to_vec(), None);
    };
    let (usual, on_demand) = xsave::usual_size(features);
    let whole = state.len();
    let bytes = if present & on_demand != 0 { whole } else { usual.min(whole) };
    let mut area = state[..bytes].to_vec();
    let numbers = [XSAVE_BEGINS, bytes as u32 + 4].map(u32::to_ne_bytes).concat();
    let numbers = [&numbers[..], &features.to_ne_bytes(), &(bytes as u32).to_ne_bytes(), &[0; 28]].concat();
    area[XSAVE_NOTE..][..numbers.len()].copy_from_slice(&numbers);
    area.extend(XSAVE_ENDS.to_ne_bytes());
    (area, (bytes < whole).then_some(whole))
}

/// Memory of process `pid` for the frame of its first thread, whose stack pointer is `rsp`: nobody else may use it, and
/// whatever is left in it does no harm. `mappings`: the process's.
pub(super) fn area_of_leader(
    pid: i32,
    mappings: &[Mapping],
    rsp: u64,
) -> Result<std::ops::Range<u64>, TraceeError> {
    let writable = libc::PROT_READ | libc::PROT_WRITE;
    let stack = mappings
        .iter()
        .find(|mapping| mapping.name == "[stack]" && mapping.protection & writable == writable);
    let none = || {
        TraceeError::Unsupported(format!(
            "the stack of process {pid} is full to its end at the moment, so that no call can be made in it: try again"
        ))
    };
    let stack = stack.ok_or_else(none)?;
    // The far end, where nothing has ever been: what is in use has a return address at least. Best, as the thread may be on
    // any other stack at this moment, and what is below its stack pointer there may be somebody else's.
    let far = stack.start..(stack.start + AREA_BYTES).min(stack.end);
    let mut bytes = vec![0; (far.end - far.start) as usize];
    mem::read_exact(pid, RemoteAddr(far.start), &mut bytes)
        .map_err(TraceeError::call("reading the stack", pid))?;
    if far.end - far.start == AREA_BYTES
        && (bytes.iter().all(|byte| *byte == 0) || is_frame(&bytes, far.start))
    {
        return Ok(far);
    }
    if !(stack.start..stack.end).contains(&rsp) {
        return Err(none());
    }
    let end = rsp - RED_ZONE;
    let start = end.saturating_sub(AREA_BYTES).max(stack.start).next_multiple_of(64);
    if start >= end { Err(none()) } else { Ok(start..end) }
}

/// Whether an area that begins at `start` still has the frame of an agent that was killed.
fn is_frame(bytes: &[u8], start: u64) -> bool {
    let frame = 16;
    bytes[frame + NOTE..].starts_with(&MAGIC)
        && bytes[frame + NOTE + MAGIC.len()..].starts_with(&(start + frame as u64).to_ne_bytes())
}

/// Whether a frame lies in the stack of the first thread of process `pid`: an agent was killed while it had that thread make a call, a moment ago
/// or long ago. What it returns by is left there when the thread is back. What can't be told is answered by yes: whoever asks stops the threads
/// once more than needed.
pub(super) fn lies_in_stack(pid: i32, mappings: &[Mapping]) -> bool {
    let Some(stack) = mappings.iter().find(|mapping| mapping.name == "[stack]") else { return false };
    if stack.len() > SEARCHED {
        return true;
    }
    let mut bytes = vec![0; stack.len() as usize];
    if mem::read_exact(pid, RemoteAddr(stack.start), &mut bytes).is_err() {
        return true;
    }
    // Frames lie at multiples of 16, and what they are known by behind that.
    let noted = (NOTE % 16..bytes.len()).step_by(16).filter(|at| bytes[*at..].starts_with(&MAGIC));
    let mut frames = noted.filter_map(|at| at.checked_sub(NOTE));
    frames.any(|frame| {
        let own = (stack.start + frame as u64).to_ne_bytes();
        bytes[frame + NOTE + MAGIC.len()..].starts_with(&own)
    })
}

/// Whether a stopped thread is on its way back from a call that an agent was killed in.
pub(super) fn is_coming_back(tid: i32, registers: &Registers) -> bool {
    // The stack pointer is at the chain, in it, or behind the frame's first word.
    let first = registers.rsp.wrapping_sub(8);
    let mut bytes = [0; NOTE_BYTES + 24];
    if mem::read_exact(tid, RemoteAddr(first.wrapping_add(NOTE as u64)), &mut bytes).is_err() {
        return false;
    }
    (0..4).any(|step| {
        let note = &bytes[step * 8..][..NOTE_BYTES];
        let word = |n: usize| note[16 + n * 8..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let [frame, call, back] = [word(0), word(1), word(2)];
        let at = |from: u64, bytes: u64| (from..=from + bytes).contains(&registers.rip);
        note.starts_with(&MAGIC) && frame == first + step as u64 * 8 && (at(call, 2) || at(back, 9))
    })
}

/// The registers of a stopped thread, taken out of its restartable sequence as a signal would take it out: once it has
/// been elsewhere, the kernel no longer knows that it was in one (rseq(2)).
pub(super) fn out_of_sequence(tid: i32, registers: Registers) -> Registers {
    const SEQUENCE: u64 = 8;
    let word = |at: u64| {
        let mut bytes = [0; 8];
        mem::read_exact(tid, RemoteAddr(at), &mut bytes).ok().map(|()| u64::from_ne_bytes(bytes))
    };
    let abort = || {
        // An old kernel has no such request, and then no rseq to speak of.
        let area = ptrace::rseq_configuration(tid).ok().filter(|area| area.address != 0)?;
        let sequence = word(area.address + SEQUENCE).filter(|at| *at != 0)?;
        // `struct rseq_cs`: version and flags, start, length, where it is aborted to.
        let [start, bytes, abort] = [word(sequence + 8)?, word(sequence + 16)?, word(sequence + 24)?];
        (registers.rip.wrapping_sub(start) < bytes).then_some(abort)
    };
    match abort() {
        Some(rip) => Registers { rip, ..registers },
        None => registers,
    }
}

#[cfg(test)]
mod tests;
