//! Capabilities of the calling thread, and those of other processes. In the kernel each thread has its own; one that it starts
//! begins with them.

use std::{fs, io};

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What a thread may, and what its children may come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What it may.
    pub permitted: CapabilitySet,
    /// More than this no program that it executes gets, whoever owns that.
    pub bounding: CapabilitySet,
}

/// What process `pid` holds (`CapPrm` and `CapBnd` in its status).
///
/// # Errors
/// It is gone, or the file says something else.
pub fn of_process(pid: u32) -> io::Result<Held> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    let set = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|word| u64::from_str_radix(word.trim(), 16).ok());
        let missing = || io::Error::other(format!("{path} has no {key}"));
        number.map(CapabilitySet::from_bits_retain).ok_or_else(missing)
    };
    Ok(Held { permitted: set("CapPrm:")?, bounding: set("CapBnd:")? })
}

/// What the calling thread may.
pub fn permitted() -> io::Result<CapabilitySet> {
    Ok(capabilities(None)?.permitted)
}

/// Leaves the calling thread no more than `kept`, all of it in effect. Programs that it executes as root get everything of
/// the bounding set again.
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    clear_ambient_capability_set()?;
    let now = capabilities(None)?;
    let kept = now.permitted & kept;
    let wanted = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    // Where nothing is to be given up, the call itself may be forbidden.
    if now == wanted { Ok(()) } else { Ok(set_capabilities(None, wanted)?) }
}

/// From now on no program that the calling thread executes gets anything that the thread doesn't have. For good.
pub fn never_gain() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}

/// Empties the calling thread's bounding set, as far as it may. For good.
pub fn empty_bounding_set() -> io::Result<()> {
    if !permitted()?.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            // The first that this kernel doesn't know.
            Err(rustix::io::Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_up_what_it_does_not_keep_and_leaves_the_others_alone() {
        let before = permitted().unwrap();
        let (kept, gained) = std::thread::spawn(|| {
            keep_only(CapabilitySet::KILL).unwrap();
            // What is gone does not come back.
            keep_only(CapabilitySet::KILL | CapabilitySet::CHOWN).unwrap();
            (permitted().unwrap(), keep_only(CapabilitySet::all()).and_then(|()| permitted()).unwrap())
        })
        .join()
        .unwrap();
        assert_eq!(kept, before & CapabilitySet::KILL);
        assert_eq!(gained, kept);
        assert_eq!(permitted().unwrap(), before);
    }

    #[test]
    fn a_process_is_read_as_the_kernel_shows_it() {
        let own = of_process(std::process::id()).unwrap();
        assert_eq!(own.permitted, permitted().unwrap());
        assert!(own.bounding.contains(own.permitted) || !nix::unistd::geteuid().is_root());
    }
}
