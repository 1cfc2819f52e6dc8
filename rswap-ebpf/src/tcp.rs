//! TCP: smoothed round-trip time per received segment, and payload bytes per call.
//!
//! A socket belongs to the cgroup that it was made in (accepted ones: that of the listener).

use aya_ebpf::{helpers::bpf_skc_to_tcp_sock, macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;
use rswap_common::layout::SlotRecord;

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{count, slot_of, slot_record},
};

offsets!(SOCK_PROTOCOL, SOCK_CGROUP, TCP_SRTT_US);

const IPPROTO_TCP: u16 = 6;
const MSG_PEEK: i32 = 2;

/// `tcp_probe(sk, skb)`: a segment has arrived on an established connection.
#[btf_tracepoint(function = "tcp_probe")]
fn tcp_probe(ctx: BtfTracePointContext) -> i32 {
    let sock: KernelPtr = ctx.arg(0);
    if let Some(slot) = slot_of_sock(sock)
        && let Some(record) = slot_record(slot)
    {
        // The verifier knows the argument only as a `struct sock`; the helper makes it the larger type.
        // SAFETY: the kernel checks the socket's type and answers null for another one.
        let tcp_sock = unsafe { bpf_skc_to_tcp_sock(sock.cast_mut()) }.cast_const();
        if tcp_sock.is_null() {
            return 0;
        }
        // The kernel keeps it in eighths of a microsecond. 0: no sample yet.
        let smoothed_eighths: u32 = field(tcp_sock.cast(), &TCP_SRTT_US);
        if smoothed_eighths != 0 {
            let rtt_us = u64::from(smoothed_eighths >> 3);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this histogram.
            unsafe { count(&mut (*record).tcp_rtt_us, rtt_us) };
            debug!(&ctx, "slot {} round trip {} us", slot, rtt_us);
        }
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
    }
    0
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
