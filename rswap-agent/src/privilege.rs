//! What the agent may: root without what it has no use for.
//!
//! ```text
//! agent, all threads    KEPT                 and no more: no modules, no clock, no raw I/O, no reboot
//!   those that serve    DAC_OVERRIDE         HTTP of whoever calls is read by threads that may nothing, and never will
//!   what it executes    the bounding set     an arriving instance may all that it might where it came from
//! ```
//!
//! The bounding set stays as it was: arriving instances are the agent's children and get theirs from it, and one that was cut
//! down would have them refused ([`crate::tracee::privileges`]). For the same reason the agent as a whole can't promise the
//! kernel to gain no privileges. This keeps mistakes small; it does not hold whoever runs code of his own in the agent, for
//! who may trace every process of a host may all that they may (`docs/security.md`).

use std::io;

use rustix::thread::CapabilitySet as Set;

use crate::{
    profile::doctor::{Feature, feature},
    sys::capability::{self, Held},
};

/// What the agent can't do without, and what by it.
pub const NEEDED: [(Set, &str); 16] = [
    (
        Set::SYS_ADMIN,
        "it makes and enters namespaces, mounts, loads eBPF programs, and lifts filters of system calls",
    ),
    (Set::SYS_PTRACE, "it stops, reads and rebuilds processes"),
    (Set::NET_ADMIN, "it configures the network of instances, and carries their connections"),
    (Set::NET_RAW, "it holds what arrives for an instance that stands still, and announces addresses"),
    (Set::NET_BIND_SERVICE, "it restores sockets at ports below 1024, and may listen there"),
    (Set::DAC_OVERRIDE, "it reads and writes files of every user, and what /proc has of their processes"),
    (Set::DAC_READ_SEARCH, "it opens files by their handles"),
    (Set::CHOWN, "it copies files with their owners"),
    (Set::FOWNER, "it copies the modes, times and attributes of files of every user"),
    (Set::FSETID, "it copies files with their set-user-ID bits"),
    (Set::SETFCAP, "it copies files with their capabilities"),
    (Set::MKNOD, "it copies device files"),
    (Set::KILL, "it signals processes of every user"),
    (Set::SYS_NICE, "it moves threads of every user to other cores"),
    (Set::SYS_CHROOT, "it enters mount namespaces"),
    (Set::IPC_OWNER, "it reads SysV objects of every user"),
];

/// What it keeps if it has it, and what some instances need it for: without it, those can't come here.
pub const USED: [(Set, &str); 2] = [
    (Set::SYS_RESOURCE, "instances with limits or OOM scores that only it can set are refused"),
    (
        Set::NET_BROADCAST,
        "instances with netlink sockets that hear of all network namespaces (NETLINK_LISTEN_ALL_NSID) are refused",
    ),
];

/// What a thread keeps that serves calls: the audit log may be in another user's directory.
const SERVING: Set = Set::DAC_OVERRIDE;

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// It may not enough.
    #[error("the agent may not enough: {0}. Start it as root with these (systemd: CapabilityBoundingSet=)")]
    Missing(String),
    /// The kernel did not take them from it.
    #[error("cannot give up the capabilities that the agent has no use for")]
    Kept(#[source] io::Error),
}

/// All that the agent keeps, if it has it.
pub fn kept() -> Set {
    NEEDED.iter().chain(&USED).fold(Set::empty(), |all, (one, _)| all | *one)
}

/// What is missing in `permitted`, and what for; `None` when nothing is.
pub fn missing(permitted: Set) -> Option<String> {
    let lacking = NEEDED.iter().filter(|(needed, _)| !permitted.contains(*needed));
    let words: Vec<String> =
        lacking.map(|(needed, why)| format!("{} is missing ({why})", names(*needed))).collect();
    (!words.is_empty()).then(|| words.join("; "))
}

/// Gives up what the agent has no use for. Threads that are started from here on have no more, either.
///
/// # Errors
/// Something that it needs is missing: nothing was given up then.
pub fn keep_what_is_needed() -> Result<(), PrivilegeError> {
    let permitted = capability::permitted().map_err(PrivilegeError::Kept)?;
    if let Some(missing) = missing(permitted) {
        return Err(PrivilegeError::Missing(missing));
    }
    capability::keep_only(kept()).map_err(PrivilegeError::Kept)
}

/// Makes the calling thread one that serves calls and nothing else.
pub fn serve_only() -> io::Result<()> {
    capability::keep_only(SERVING)?;
    capability::never_gain()
}

/// Makes this process one that reads and writes its own files and sockets, whatever it executes: a controller. Other threads
/// that it has already are left as they are.
pub fn keep_nothing() -> io::Result<()> {
    capability::empty_bounding_set()?;
    capability::keep_only(Set::empty())?;
    capability::never_gain()
}

/// Whether `held`, that of `whom`, is enough for an agent.
pub fn needed_feature(whom: &str, held: &io::Result<Held>) -> Feature {
    let finding = match held {
        Err(error) => Err(format!("{whom}: {error}")),
        Ok(held) => match missing(held.permitted) {
            None => Ok(format!("{whom} has {}", names(held.permitted & kept()))),
            Some(missing) => Err(format!("{whom}: {missing}")),
        },
    };
    feature("capabilities", finding, "the agent does not start")
}

/// Whether `held`, that of `whom`, is enough for what only some instances need.
pub fn used_feature(whom: &str, held: &io::Result<Held>) -> Feature {
    let lacking =
        |held: &Held| USED.into_iter().filter(|(one, _)| !held.permitted.contains(*one)).collect::<Vec<_>>();
    let lacking = held.as_ref().map(lacking);
    let finding = match &lacking {
        Err(error) => Err(format!("{whom}: {error}")),
        Ok(lacking) if lacking.is_empty() => Ok(format!("{whom} has all")),
        Ok(lacking) => {
            let set = lacking.iter().fold(Set::empty(), |all, (one, _)| all | *one);
            Err(format!("{whom} has all but {}", names(set)))
        }
    };
    let costs: Vec<&str> = lacking.iter().flatten().map(|(_, cost)| *cost).collect();
    feature("capabilities for some instances", finding, &costs.join("; "))
}

/// Whether instances that arrive can get all that they might have elsewhere from `held`, that of `whom`.
pub fn bounding_feature(whom: &str, held: &io::Result<Held>) -> Feature {
    let finding = match held {
        Err(error) => Err(format!("{whom}: {error}")),
        Ok(held) => match all_known().difference(held.bounding) {
            lacking if lacking.is_empty() => Ok(format!("{whom} has all")),
            lacking => Err(format!("{whom} has all but {}", names(lacking))),
        },
    };
    let cost = "an instance that might get these where it runs can't come here";
    feature("bounding set of capabilities", finding, cost)
}

/// All that this version of the program has a name for; the kernel may know more.
fn all_known() -> Set {
    Set::all().iter_names().fold(Set::empty(), |all, (_, one)| all | one)
}

fn names(set: Set) -> String {
    set.iter_names().map(|(name, _)| format!("CAP_{name}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_what_it_is_for() {
        assert_eq!(missing(Set::all()), None);
        let used = USED.into_iter().fold(Set::empty(), |all, (one, _)| all | one);
        assert_eq!(missing(kept().difference(used)), None, "it does without these");
        assert!(kept().contains(used));
        for (one, why) in NEEDED {
            let said = missing(Set::all().difference(one)).unwrap();
            assert_eq!(said, format!("{} is missing ({why})", names(one)));
        }
        assert_eq!(missing(Set::empty()).unwrap().matches("CAP_").count(), NEEDED.len());
    }

    #[test]
    fn neither_the_kernel_nor_the_clock_is_the_agents_to_change() {
        for never in [Set::SYS_MODULE, Set::SYS_RAWIO, Set::SYS_BOOT, Set::SYS_TIME, Set::MAC_ADMIN] {
            assert!(!kept().intersects(never), "{}", names(never));
        }
    }

    #[test]
    fn an_agent_that_lacks_something_gives_nothing_up() {
        let refused = std::thread::spawn(|| {
            capability::keep_only(Set::all().difference(Set::SYS_PTRACE)).unwrap();
            let before = capability::permitted().unwrap();
            let error = keep_what_is_needed().unwrap_err().to_string();
            assert_eq!(capability::permitted().unwrap(), before);
            error
        });
        assert!(refused.join().unwrap().contains("CAP_SYS_PTRACE is missing"));
    }

    #[test]
    fn a_thread_that_serves_may_not_trace() {
        std::thread::spawn(|| {
            serve_only().unwrap();
            assert!(SERVING.contains(capability::permitted().unwrap()));
            assert!(rustix::thread::no_new_privs().unwrap());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_doctor_names_what_is_missing() {
        let held = Held {
            permitted: kept().difference(Set::KILL),
            bounding: Set::all().difference(Set::SYS_RESOURCE),
        };
        let (needed, bounding) = (needed_feature("pid 7", &Ok(held)), bounding_feature("pid 7", &Ok(held)));
        assert!(!needed.present && needed.detail.starts_with("pid 7: CAP_KILL is missing"), "{needed:?}");
        assert_eq!((bounding.present, &*bounding.detail), (false, "pid 7 has all but CAP_SYS_RESOURCE"));
        let held = Held { permitted: kept().difference(Set::NET_BROADCAST), bounding: Set::all() };
        let used = used_feature("pid 7", &Ok(held));
        assert_eq!((used.present, &*used.detail), (false, "pid 7 has all but CAP_NET_BROADCAST"));
        assert!(
            used.cost_of_lack.contains("NETLINK_LISTEN_ALL_NSID") && !used.cost_of_lack.contains("OOM"),
            "{used:?}"
        );
        let gone = needed_feature("pid 7", &Err(io::Error::other("gone")));
        assert_eq!((gone.present, &*gone.detail), (false, "pid 7: gone"));
    }
}
