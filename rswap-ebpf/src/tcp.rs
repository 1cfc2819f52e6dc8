//! TCP: what came over connections and went, and how long round trips took, connections, and what is sent again.
//!
//! The kernel counts each connection's bytes by itself: nothing is to be done where a program sends or receives. A connection is remembered by its socket's address from its
//! beginning on; what is new of it is taken over when the agent hands over all addresses, at a window's end, and when it ends.
//!
//! A socket belongs to the cgroup that it was made in (accepted ones: that of the listener).

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_xchg},
};

use aya_ebpf::{
    Global,
    helpers::{bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_sock_from_file},
    macros::{btf_tracepoint, map, raw_tracepoint},
    maps::{Array, HashMap},
    programs::{BtfTracePointContext, RawTracePointContext},
};
use aya_log_ebpf::debug;

use rswap_common::layout::{CONNECTIONS_AT_ONCE, MAX_CONNECTIONS, SlotRecord};

use crate::{
    kernel::{CGROUP_KN, KERNFS_ID, KernelPtr, cgroup_id, field, number_of, offsets},
    maps::{add, count, count_shared, slot_of, slot_record, tally},
};

offsets!(
    SOCK_PROTOCOL,
    SOCK_TYPE,
    SOCK_STATE,
    SOCK_CGROUP,
    SOCK_FLAGS,
    SOCKET_SK,
    TCP_SRTT_US,
    TCP_BYTES_RECEIVED,
    TCP_BYTES_SENT,
    TCP_BYTES_RETRANSMITTED,
);

const IPPROTO_TCP: u16 = 6;
const SOCK_STREAM: u16 = 1;

// States of TCP, which programs see (`tcpi_state`) and which so keep their numbers.
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_SYN_RECEIVED: u32 = 3;
const TCP_CLOSE: u32 = 7;
/// States of a connection that both sides know of: established, both that wait for its end, the two in which the other side has ended it, closing.
const LIVES: u32 = 1 << TCP_ESTABLISHED | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// The same, and those in which one is as it is said to be established.
const MAY_BE_KNOWN: u32 = LIVES | 1 << TCP_SYN_SENT | 1 << TCP_SYN_RECEIVED;

#[unsafe(no_mangle)]
static RETRANSMIT_HAS_ERROR: Global<u32> = Global::new(0);

/// The flag of a socket that says that the other side has sent its end.
#[unsafe(no_mangle)]
static SOCK_DONE: Global<u32> = Global::new(0);

/// Connections of instances, by their sockets' addresses ([`number_of`]). Storage of sockets would go with them; but there are kernels that let nobody walk over that.
/// Room for all is made at once: before Linux 6.1 the kernel warns of programs that trace and would make it as they run.
#[map]
static CONNECTIONS: HashMap<u64, Connection> = HashMap::with_max_entries(MAX_CONNECTIONS, 0);

/// How often these programs were away so far: what was remembered of a connection before is not compared with what is there now.
#[map]
static TCP_ERA: Array<u64> = Array::with_max_entries(1, 0);

/// What is remembered of a connection.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Connection {
    /// Bytes that were counted, or had come before it was known.
    received: u64,
    /// The same of those that went.
    sent: u64,
    /// When it began; 0: that was not seen.
    since_ns: u64,
    /// For whom it is counted, or [`NOBODY`].
    slot: u64,
    /// [`TCP_ERA`] when that was said.
    era: u64,
}

const NOBODY: u64 = u64::MAX;

/// What a program at the kernel's iterator `task_file` is called with. At the end of a walk there is no file.
#[repr(C)]
pub struct AtFile {
    meta: *const c_void,
    task: *const c_void,
    descriptor: u64,
    file: KernelPtr,
}

/// Called by the agent, with the addresses of connections that are known: no tracepoint's.
#[raw_tracepoint]
fn tcp_connections(ctx: RawTracePointContext) -> i32 {
    // The verifier wants arguments read at places that are constant.
    let mut keys: [u64; CONNECTIONS_AT_ONCE] = [
        ctx.arg(0),
        ctx.arg(1),
        ctx.arg(2),
        ctx.arg(3),
        ctx.arg(4),
        ctx.arg(5),
        ctx.arg(6),
        ctx.arg(7),
        ctx.arg(8),
        ctx.arg(9),
        ctx.arg(10),
        ctx.arg(11),
    ];
    // SAFETY: one move of a register onto itself: the compiler has to take them for written to.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) keys.as_mut_ptr() => _, options(nostack)) };
    for &key in &keys {
        if key == 0 {
            break;
        }
        let Some(connection) = CONNECTIONS.get_ptr_mut(&key) else { continue };
        let sock = key.swap_bytes() as KernelPtr;
        if !is_tcp_in(sock, MAY_BE_KNOWN) {
            // Its end was missed.
            forget(key, connection);
            continue;
        }
        look_at(sock, connection);
        // SAFETY: the map gave the pointer.
        if unsafe { (*connection).slot } == NOBODY {
            // It is found again when its cgroup is somebody's.
            _ = CONNECTIONS.remove(&key);
        }
    }
    0
}

/// At each file of a process: connections that were there before they could be seen to begin are remembered.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn tcp_sockets(at: *const AtFile) -> i32 {
    // SAFETY: the kernel hands over what the iterator is about.
    let file = unsafe { (*at).file };
    if file.is_null() {
        return 0;
    }
    // SAFETY: the kernel answers null for a file of another kind.
    let socket: KernelPtr = unsafe { bpf_sock_from_file(file.cast_mut().cast()) }.cast_const().cast();
    if socket.is_null() {
        return 0;
    }
    let sock: KernelPtr = read(socket, &SOCKET_SK);
    // One that listens, or is to be connected, is seen to begin.
    if !is_tcp_in(sock, LIVES) {
        return 0;
    }
    let key = number_of(sock);
    if let Some(slot) = owner(sock)
        && CONNECTIONS.get_ptr_mut(&key).is_none()
    {
        let (received, sent) = moved(sock);
        remember(key, &Connection { received, sent, since_ns: 0, slot: slot.into(), era: era() });
    }
    0
}

/// `tcp_retransmit_skb(sk, skb, err)`: something was sent again, or could not be, where there is a third argument.
#[btf_tracepoint(function = "tcp_retransmit_skb")]
fn tcp_retransmit_skb(ctx: BtfTracePointContext) -> i32 {
    // Constant: a kernel whose tracepoint has no such argument does not see it asked for.
    if RETRANSMIT_HAS_ERROR.load() == 1 && ctx.arg::<i32>(2) != 0 {
        return 0;
    }
    if let Some(slot) = slot_of_sock(ctx.arg(0))
        && let Some(record) = slot_record(slot)
    {
        // SAFETY: the map gave the pointer, and only this program on this CPU writes this counter.
        unsafe { (*record).tcp.retransmits = (*record).tcp.retransmits.wrapping_add(1) };
    }
    0
}

/// `inet_sock_set_state(sk, oldstate, newstate)`.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let sock: KernelPtr = ctx.arg(0);
    let (old, new): (u32, u32) = (ctx.arg(1), ctx.arg(2));
    if new != TCP_ESTABLISHED && new != TCP_CLOSE || field::<u16>(sock, &SOCK_PROTOCOL) != IPPROTO_TCP {
        return 0;
    }
    let slot = slot_of_sock(sock);
    if slot.is_some() {
        debug!(&ctx, "connection: state {} after {}", new, old);
    }
    let key = number_of(sock);
    let known = CONNECTIONS.get_ptr_mut(&key);
    if new == TCP_ESTABLISHED {
        if let Some(connection) = known {
            // Of another one at this address, of which the end was missed.
            forget(key, connection);
        }
        if let Some(slot) = slot {
            begins(sock, slot, old);
        }
        return 0;
    }
    let mut since_ns = 0;
    if let Some(connection) = known {
        look_at(sock, connection);
        // SAFETY: the map gave the pointer.
        since_ns = unsafe { (*connection).since_ns };
        // The socket may stay for long, or be connected again. If a walk was faster, it has counted the end.
        if CONNECTIONS.remove(&key).is_err() {
            since_ns = 0;
        }
    }
    if let Some(slot) = slot {
        ends(slot, old, since_ns);
    }
    0
}

/// A connection is there.
#[inline(always)]
fn begins(sock: KernelPtr, slot: u32, old: u32) {
    let Some(record) = slot_record(slot) else { return };
    // SAFETY: the map gave the pointer, and only one program on this CPU writes these counters.
    let counts = unsafe { &mut (*record).tcp };
    let counted = if old == TCP_SYN_SENT { &mut counts.opened } else { &mut counts.accepted };
    *counted = counted.wrapping_add(1);
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let since_ns = unsafe { bpf_ktime_get_ns() };
    let new = Connection { received: 0, sent: 0, since_ns, slot: slot.into(), era: era() };
    if !remember(number_of(sock), &new) {
        // Its end will not be seen: it is not open for ever.
        end_is_seen(record);
    }
}

/// A connection is over that was seen to begin then, if that is not 0; or there was none.
#[inline(always)]
fn ends(slot: u32, old: u32, since_ns: u64) {
    let Some(record) = slot_record(slot) else { return };
    // SAFETY: as in `begins`.
    let counts = unsafe { &mut (*record).tcp };
    if old == TCP_SYN_SENT {
        counts.failed = counts.failed.wrapping_add(1);
        return;
    }
    // Listening sockets, those that were never connected, and connections of which the other side's last answer never came.
    if LIVES & (1 << (old & 31)) == 0 {
        return;
    }
    counts.closed = counts.closed.wrapping_add(1);
    if since_ns != 0 {
        end_is_seen(record);
        // SAFETY: a helper without arguments; unsafe only for being foreign.
        let now = unsafe { bpf_ktime_get_ns() };
        // SAFETY: as in `begins`.
        count(unsafe { &mut (*record).tcp_life_us }, now.saturating_sub(since_ns) / 1000);
    }
}

/// A connection of which the beginning was seen is not open any more, for this slot. A walk says so, too.
#[inline(always)]
fn end_is_seen(record: *mut SlotRecord) {
    // SAFETY: the map gave the pointer.
    add(unsafe { &raw mut (*record).tcp.seen }, 1, false);
}

/// Counts what is new of a connection for who had it until now, and whose it is from now on.
#[inline(always)]
fn look_at(sock: KernelPtr, connection: *mut Connection) {
    let (era, (received, sent)) = (era(), moved(sock));
    // SAFETY: the map gave the pointer. A walk and the connection's end may meet here, on two CPUs: `more` minds.
    let (counted_for, known_in) = unsafe { ((*connection).slot, (*connection).era) };
    if known_in != era {
        let (since_ns, slot) = (0, counted_for);
        // SAFETY: as above.
        unsafe { *connection = Connection { received, sent, since_ns, slot, era } };
    }
    // SAFETY: as above.
    let (came, went) =
        unsafe { (more(&raw mut (*connection).received, received), more(&raw mut (*connection).sent, sent)) };
    if came | went != 0
        && counted_for != NOBODY
        && let Some(record) = slot_record(counted_for as u32)
    {
        // SAFETY: the map gave the pointer. A walk may be interrupted by the end of a connection: hence not alone.
        unsafe {
            add(&raw mut (*record).tcp_bytes_in, came, false);
            add(&raw mut (*record).tcp_bytes_out, went, false);
        }
        // The kernel keeps it in eighths of a microsecond. 0: no sample yet.
        let smoothed_eighths: u32 = read(sock, &TCP_SRTT_US);
        if smoothed_eighths != 0 {
            // SAFETY: as above.
            let (sum, buckets) =
                unsafe { (&raw mut (*record).tcp_rtt_us.sum, &raw mut (*record).tcp_rtt_us.buckets) };
            count_shared(sum, buckets, u64::from(smoothed_eighths >> 3), false);
        }
    }
    let slot = owner(sock).map_or(NOBODY, u64::from);
    if counted_for != slot {
        // SAFETY: as above.
        let since_ns = unsafe { (*connection).since_ns };
        if since_ns != 0
            && let Some(record) = slot_record(counted_for as u32)
        {
            end_is_seen(record);
        }
        // That it began, and how it ends, is not its new one's.
        // SAFETY: as above.
        unsafe { ((*connection).slot, (*connection).since_ns) = (slot, 0) };
    }
}

/// How much more there is `now` than was seen, which it is from then on.
#[inline(always)]
fn more(seen: *mut u64, now: u64) -> u64 {
    let since = |before: u64| (now.wrapping_sub(before) as i64).max(0) as u64;
    // What is sent again is counted as such a moment before it is sent.
    // SAFETY: in a map's value. Others may write it meanwhile: it is read at once.
    if since(unsafe { seen.read_volatile() }) == 0 {
        return 0;
    }
    // SAFETY: as above.
    since(unsafe { atomic_xchg::<u64, { AtomicOrdering::Relaxed }>(seen, now) })
}

/// Bytes that came over a connection, in order, and that were sent, each once.
#[inline(always)]
fn moved(sock: KernelPtr) -> (u64, u64) {
    let flags: u64 = read(sock, &SOCK_FLAGS);
    // The end of what the other side sends is counted as a byte.
    let end = u64::from(flags & u64::from(SOCK_DONE.load()) != 0);
    let received = read::<u64>(sock, &TCP_BYTES_RECEIVED).wrapping_sub(end);
    let sent = read::<u64>(sock, &TCP_BYTES_SENT);
    (received, sent.wrapping_sub(read(sock, &TCP_BYTES_RETRANSMITTED)))
}

/// Remembers a connection; `false`: there is no room, or no memory, for that, and it is not counted.
#[inline(always)]
fn remember(key: u64, connection: &Connection) -> bool {
    let is_kept = CONNECTIONS.insert(&key, connection, 0).is_ok();
    if !is_kept {
        tally(|of| &mut of.lost_connections);
    }
    is_kept
}

/// Forgets a connection that has ended without being seen to.
#[inline(always)]
fn forget(key: u64, connection: *mut Connection) {
    // SAFETY: the map gave the pointer.
    let (slot, since_ns) = unsafe { ((*connection).slot, (*connection).since_ns) };
    // Who takes it out counts its end.
    if CONNECTIONS.remove(&key).is_ok()
        && slot != NOBODY
        && since_ns != 0
        && let Some(record) = slot_record(slot as u32)
    {
        end_is_seen(record);
    }
}

/// Whether this is a socket of TCP in one of these states, as far as what is at its address says.
#[inline(always)]
fn is_tcp_in(sock: KernelPtr, states: u32) -> bool {
    read::<u16>(sock, &SOCK_PROTOCOL) == IPPROTO_TCP
        && read::<u16>(sock, &SOCK_TYPE) == SOCK_STREAM
        && states & (1 << (read::<u8>(sock, &SOCK_STATE) & 31)) != 0
}

#[inline(always)]
fn era() -> u64 {
    TCP_ERA.get(0).copied().unwrap_or(0)
}

/// The field of type `T` at `offset` of what is at an address, of which the verifier knows nothing; 0 where nothing can be read.
#[inline(always)]
fn read<T: Copy>(base: KernelPtr, offset: &Global<u64>) -> T {
    // SAFETY: the kernel reads it, and fails where nothing is there; all that is read so may be 0.
    unsafe {
        bpf_probe_read_kernel(base.byte_add(offset.load() as usize).cast::<T>())
            .unwrap_or(core::mem::zeroed())
    }
}

/// The slot of the cgroup that a socket was made in, of which only the address is known.
#[inline(always)]
fn owner(sock: KernelPtr) -> Option<u32> {
    slot_of(read(read(read(sock, &SOCK_CGROUP), &CGROUP_KN), &KERNFS_ID))
}

/// The slot of the cgroup that a socket was made in.
#[inline(always)]
fn slot_of_sock(sock: KernelPtr) -> Option<u32> {
    slot_of(cgroup_id(field(sock, &SOCK_CGROUP)))
}
