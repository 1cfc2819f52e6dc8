//! Rates of an instance's port, by the kernel's token bucket filter (`tc-tbf(8)`).

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::{
    Error, Handle,
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
        Nla, NlasIterator,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage, TcOption, TcStats2},
    },
};

const KIND: &str = "tbf";
/// Attributes of a token bucket filter (`linux/pkt_sched.h`).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `struct tc_ratespec` is 12 bytes with the rate at the end; `struct tc_tbf_qopt` is two of them, limit, buffer, MTU.
const RATE_AT: usize = 8;
const RATESPEC: usize = 12;

/// What may go out at once, in bytes: 10 ms of the rate. What is more is kept up to 100 ms of it, and then dropped, as at the
/// end of a slow line. Neither is less than some frames of segmentation offload.
fn burst(bytes_per_s: u64) -> u32 {
    u32::try_from(bytes_per_s / 100).unwrap_or(u32::MAX).max(16 << 10)
}

fn limit(bytes_per_s: u64) -> u32 {
    burst(bytes_per_s).saturating_add(u32::try_from(bytes_per_s / 10).unwrap_or(u32::MAX)).max(256 << 10)
}

fn options(bytes_per_s: u64) -> Vec<TcOption> {
    let mut parameters = vec![0; 2 * RATESPEC];
    let rate = u32::try_from(bytes_per_s).unwrap_or(u32::MAX);
    parameters[RATE_AT..RATESPEC].copy_from_slice(&rate.to_ne_bytes());
    parameters.extend(limit(bytes_per_s).to_ne_bytes());
    parameters.extend([0; 8]);
    let option = |kind, value: Vec<u8>| TcOption::Other(DefaultNla::new(kind, value));
    vec![
        option(TCA_TBF_PARMS, parameters),
        option(TCA_TBF_RATE64, bytes_per_s.to_ne_bytes().to_vec()),
        option(TCA_TBF_BURST, burst(bytes_per_s).to_ne_bytes().to_vec()),
    ]
}

/// The rate in the options of a token bucket filter, in bytes per second.
fn rate_in(nested: &[u8]) -> Option<u64> {
    let mut rate = None;
    for attribute in NlasIterator::new(nested) {
        let attribute = attribute.ok()?;
        let value = attribute.value();
        match attribute.kind() {
            TCA_TBF_PARMS if rate.is_none() => {
                rate = value
                    .get(RATE_AT..RATESPEC)?
                    .first_chunk()
                    .map(|rate| u64::from(u32::from_ne_bytes(*rate)));
            }
            TCA_TBF_RATE64 => rate = value.first_chunk().map(|rate| u64::from_ne_bytes(*rate)),
            _ => {}
        }
    }
    rate
}

/// What limits what goes out of an interface.
pub(super) struct Limit {
    /// In bytes per second.
    pub(super) bytes_per_s: u64,
    /// What waits, in bytes.
    backlog: u32,
}

/// The limit on interface `index`; `None` if nothing of ours is there.
pub(super) async fn get(handle: &Handle, index: u32) -> Result<Option<Limit>, Error> {
    let mut all = handle.qdisc().get().index(index as i32).execute();
    let mut found = None;
    while let Some(message) = all.try_next().await? {
        if message.header.index != index as i32 || message.header.parent != TcHandle::ROOT {
            continue;
        }
        let is_ours = message.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == KIND));
        let mut limit = Limit { bytes_per_s: 0, backlog: 0 };
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Options(options) => {
                    for option in options {
                        let mut nested = vec![0; option.value_len()];
                        option.emit_value(&mut nested);
                        limit.bytes_per_s = rate_in(&nested).unwrap_or(limit.bytes_per_s);
                    }
                }
                TcAttribute::Stats2(all) => {
                    for one in all {
                        if let TcStats2::Queue(queue) = one {
                            limit.backlog = queue.backlog;
                        }
                    }
                }
                _ => {}
            }
        }
        found = is_ours.then_some(limit);
    }
    Ok(found)
}

/// Limits what goes out of interface `index`, or what it does already. What waits there stays in its queue.
pub(super) async fn set(handle: &Handle, index: u32, bytes_per_s: u64) -> Result<(), Error> {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::ROOT;
    message.attributes = vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Options(options(bytes_per_s))];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// Lets everything through again, and what waits first: with its queue it would be lost.
pub(super) async fn lift(handle: &Handle, index: u32) -> Result<(), Error> {
    const UNLIMITED_BYTES_PER_S: u64 = 100_000_000_000;
    const LOOKS: u32 = 100;
    if get(handle, index).await?.is_none() {
        return Ok(());
    }
    set(handle, index, UNLIMITED_BYTES_PER_S).await?;
    for _ in 0..LOOKS {
        if get(handle, index).await?.is_none_or(|limit| limit.backlog == 0) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let mut removal = handle.qdisc().del(index as i32);
    removal.message_mut().header.parent = TcHandle::ROOT;
    removal.execute().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(options: &[TcOption]) -> Vec<u8> {
        use rtnetlink::packet_core::Emitable;
        let mut bytes = vec![0; options.buffer_len()];
        options.emit(&mut bytes);
        bytes
    }

    proptest::proptest! {
        #[test]
        fn a_rate_is_read_as_it_was_written(bytes_per_s in 1_u64..1 << 40) {
            let bytes = nested(&options(bytes_per_s));
            proptest::prop_assert_eq!(rate_in(&bytes), Some(bytes_per_s));
            // Without the long attribute, which the kernel leaves out where it can.
            let bytes = nested(&options(bytes_per_s)[..1]);
            proptest::prop_assert_eq!(rate_in(&bytes), Some(bytes_per_s.min(u64::from(u32::MAX))));
        }

        #[test]
        fn any_answer_is_read(bytes: Vec<u8>) {
            let _ = rate_in(&bytes);
        }
    }

    #[test]
    fn a_slow_line_takes_whole_frames_and_a_fast_one_keeps_a_tenth_of_a_second() {
        assert_eq!((burst(1000), limit(1000)), (16 << 10, 256 << 10));
        assert_eq!((burst(1_000_000_000), limit(1_000_000_000)), (10_000_000, 110_000_000));
    }
}
