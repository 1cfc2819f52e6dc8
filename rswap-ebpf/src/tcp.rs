//! TCP: smoothed round-trip time and payload bytes per call, connections, and what is sent again.
//!
//! A socket belongs to the cgroup that it was made in (accepted ones: that of the listener).

use aya_ebpf::{
    Global,
    helpers::{bpf_ktime_get_ns, bpf_skc_to_tcp_sock},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::debug;
use rswap_common::layout::SlotRecord;

use crate::{
    kernel::{KernelPtr, cgroup_id, field, number_of, offsets},
    maps::{count, slot_of, slot_record},
    sets::{remember_connection, take_connection},
};

offsets!(SOCK_PROTOCOL, SOCK_CGROUP, TCP_SRTT_US);

const IPPROTO_TCP: u16 = 6;
const MSG_PEEK: i32 = 2;

// States of TCP, which programs see (`tcpi_state`) and which so keep their numbers.
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;
/// States of a connection that both sides know of: established, both that wait for its end, the two in which the other side has ended it, closing.
const LIVES: u32 = 1 << TCP_ESTABLISHED | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

#[unsafe(no_mangle)]
static RETRANSMIT_HAS_ERROR: Global<u32> = Global::new(0);

/// `tcp_probe(sk, skb)`: a segment has arrived on an established connection. It is attached only where the kernel does not tell of sends.
#[btf_tracepoint(function = "tcp_probe")]
fn tcp_probe(ctx: BtfTracePointContext) -> i32 {
    let sock: KernelPtr = ctx.arg(0);
    if let Some(slot) = slot_of_sock(sock)
        && let Some(record) = slot_record(slot)
    {
        count_round_trip(&ctx, sock, record);
    }
    0
}

/// `sock_send_length(sk, ret, flags)`: `ret` bytes were taken from the program, or an error if negative.
#[btf_tracepoint(function = "sock_send_length")]
fn sock_send_length(ctx: BtfTracePointContext) -> i32 {
    let result: i32 = ctx.arg(1);
    if let Some(record) = tcp_record(&ctx, result) {
        // SAFETY: the map gave the pointer, and only this program on this CPU writes this counter.
        unsafe { (*record).tcp_bytes_out = (*record).tcp_bytes_out.wrapping_add(result as u64) };
        count_round_trip(&ctx, ctx.arg(0), record);
    }
    0
}

/// Counts the round-trip time that the kernel has of a connection now.
#[inline(always)]
fn count_round_trip(ctx: &BtfTracePointContext, sock: KernelPtr, record: *mut SlotRecord) {
    // The verifier knows the argument only as a `struct sock`; the helper makes it the larger type.
    // SAFETY: the kernel checks the socket's type and answers null for another one.
    let tcp_sock = unsafe { bpf_skc_to_tcp_sock(sock.cast_mut()) }.cast_const();
    if tcp_sock.is_null() {
        return;
    }
    // The kernel keeps it in eighths of a microsecond. 0: no sample yet.
    let smoothed_eighths: u32 = field(tcp_sock.cast(), &TCP_SRTT_US);
    if smoothed_eighths != 0 {
        let rtt_us = u64::from(smoothed_eighths >> 3);
        // SAFETY: the map gave the pointer, and only one program on this CPU writes this histogram.
        unsafe { count(&mut (*record).tcp_rtt_us, rtt_us) };
        debug!(ctx, "round trip {} us", rtt_us);
    }
}

/// `sock_recv_length(sk, ret, flags)`: `ret` bytes were given to the program, or an error if negative.
#[btf_tracepoint(function = "sock_recv_length")]
fn sock_recv_length(ctx: BtfTracePointContext) -> i32 {
    let result: i32 = ctx.arg(1);
    let flags: i32 = ctx.arg(2);
    // A peek leaves the bytes in the queue: they are counted when they are read.
    if flags & MSG_PEEK == 0
        && let Some(record) = tcp_record(&ctx, result)
    {
        // SAFETY: the map gave the pointer, and only this program on this CPU writes this counter.
        unsafe { (*record).tcp_bytes_in = (*record).tcp_bytes_in.wrapping_add(result as u64) };
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
    let Some(slot) = slot_of_sock(sock) else { return 0 };
    let Some(record) = slot_record(slot) else { return 0 };
    // SAFETY: the map gave the pointer, and only this program on this CPU writes these counters.
    let record = unsafe { &mut *record };
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let now = unsafe { bpf_ktime_get_ns() };
    let counts = &mut record.tcp;
    let counted = match (old, new) {
        (TCP_SYN_SENT, TCP_CLOSE) => &mut counts.failed,
        // Listening sockets, those that were never connected, and connections of which the other side's last answer never came.
        (_, TCP_CLOSE) if LIVES & (1 << (old & 31)) == 0 => return 0,
        (_, TCP_CLOSE) => &mut counts.closed,
        (TCP_SYN_SENT, _) => &mut counts.opened,
        _ => &mut counts.accepted,
    };
    *counted = counted.wrapping_add(1);
    if new == TCP_ESTABLISHED {
        // Its end will not be seen: it is not open for ever.
        if let Some(other) = remember_connection(number_of(sock), slot, now)
            && let Some(record) = slot_record(other)
        {
            // SAFETY: as above: this CPU's record.
            unsafe { (*record).tcp.seen = (*record).tcp.seen.wrapping_add(1) };
        }
    } else if let Some(life_us) = take_connection(number_of(sock), now) {
        record.tcp.seen = record.tcp.seen.wrapping_add(1);
        count(&mut record.tcp_life_us, life_us);
    }
    0
}

/// This CPU's record for a call that moved `result` bytes over a tracked TCP socket.
#[inline(always)]
fn tcp_record(ctx: &BtfTracePointContext, result: i32) -> Option<*mut SlotRecord> {
    let sock: KernelPtr = ctx.arg(0);
    if result <= 0 || field::<u16>(sock, &SOCK_PROTOCOL) != IPPROTO_TCP {
        return None;
    }
    slot_record(slot_of_sock(sock)?)
}

/// The slot of the cgroup that a socket was made in.
#[inline(always)]
fn slot_of_sock(sock: KernelPtr) -> Option<u32> {
    slot_of(cgroup_id(field(sock, &SOCK_CGROUP)))
}
