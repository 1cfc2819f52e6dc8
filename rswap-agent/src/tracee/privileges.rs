//! Users, groups and capabilities of a thread: each has its own in the kernel.

use super::{TraceeError, capture::Status, image::Credentials, remote::Remote};

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// `PR_CAP_AMBIENT_RAISE`.
const AMBIENT_RAISE: u64 = 2;

/// What the thread behind `remote`, which is stopped, may do; `status` is its own.
pub(super) fn capture(remote: &mut Remote, status: &Status) -> Result<Credentials, TraceeError> {
    Ok(Credentials { secure_bits: secure_bits(remote)?, ..status.credentials() })
}

fn secure_bits(remote: &mut Remote) -> Result<u32, TraceeError> {
    let args = [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0, 0];
    Ok(remote.call("prctl", libc::SYS_prctl, args)? as u32)
}

/// Gives a stub's thread, which has all that the agent may give it, what `wanted` says. The order is that of what each
/// step takes away.
pub fn restore(remote: &mut Remote, wanted: &Credentials) -> Result<(), TraceeError> {
    let here = Status::read(remote.tid())?.credentials();
    let bits_here = secure_bits(remote)?;
    if (Credentials { secure_bits: bits_here, ..here.clone() }) == *wanted {
        return Ok(());
    }
    if here.groups != wanted.groups {
        let groups: Vec<u8> = wanted.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
        let at = remote.put(0, &groups)?;
        let args = [wanted.groups.len() as u64, at, 0, 0, 0, 0];
        remote.call("setgroups", libc::SYS_setgroups, args)?;
    }
    if wanted.no_new_privs {
        remote.call("prctl", libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0])?;
    }
    for capability in bits(here.capabilities[3] & !wanted.capabilities[3]) {
        remote.call("prctl", libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u64, capability, 0, 0, 0, 0])?;
    }
    let [inheritable, permitted, effective, _, ambient] = wanted.capabilities;
    let changes_user = here.uids != wanted.uids || here.gids != wanted.gids;
    if changes_user {
        remote.call("prctl", libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u64, 1, 0, 0, 0, 0])?;
        let ids = |ids: [u32; 4]| ids.map(u64::from);
        let [real, effective, saved, files] = ids(wanted.gids);
        remote.call("setresgid", libc::SYS_setresgid, [real, effective, saved, 0, 0, 0])?;
        if files != effective {
            remote.call("setfsgid", libc::SYS_setfsgid, [files, 0, 0, 0, 0, 0])?;
        }
        let [real, effective, saved, files] = ids(wanted.uids);
        remote.call("setresuid", libc::SYS_setresuid, [real, effective, saved, 0, 0, 0])?;
        if files != effective {
            remote.call("setfsuid", libc::SYS_setfsuid, [files, 0, 0, 0, 0, 0])?;
        }
        // One of its bits, and only for the change of users.
        remote.call("prctl", libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u64, 0, 0, 0, 0, 0])?;
    }
    let all = Status::read(remote.tid())?.credentials().capabilities[1];
    if ambient != 0 || bits_here != wanted.secure_bits {
        // Everything once more: both need it.
        set_capabilities(remote, inheritable, all, all)?;
        for capability in bits(ambient) {
            let args = [libc::PR_CAP_AMBIENT as u64, AMBIENT_RAISE, capability, 0, 0, 0];
            remote.call("prctl", libc::SYS_prctl, args)?;
        }
        let args = [libc::PR_SET_SECUREBITS as u64, wanted.secure_bits.into(), 0, 0, 0, 0];
        remote.call("prctl", libc::SYS_prctl, args)?;
    }
    if Status::read(remote.tid())?.credentials().capabilities[..3] != wanted.capabilities[..3] {
        set_capabilities(remote, inheritable, permitted, effective)?;
    }
    let made = Credentials { secure_bits: secure_bits(remote)?, ..Status::read(remote.tid())?.credentials() };
    if made != *wanted {
        let text = format!("thread {} would be {made:?} and was {wanted:?}", remote.tid());
        return Err(TraceeError::Unsupported(text));
    }
    Ok(())
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |n| set >> n & 1 == 1)
}

fn set_capabilities(
    remote: &mut Remote,
    inheritable: u64,
    permitted: u64,
    effective: u64,
) -> Result<(), TraceeError> {
    // For the calling thread; then two sets of 32 bits.
    let header = [CAPABILITY_VERSION, 0].map(u32::to_ne_bytes).concat();
    let half =
        |shift: u32| [effective, permitted, inheritable].map(|set| ((set >> shift) as u32).to_ne_bytes());
    let header_at = remote.put(0, &header)?;
    let data_at = remote.put(16, &[half(0), half(32)].concat().concat())?;
    remote.call("capset", libc::SYS_capset, [header_at, data_at, 0, 0, 0, 0]).map(drop)
}
