//! What is to be done with a host, by what was found there. Pure.

use serde::Deserialize;

use super::release::Release;

/// An instance, as an agent lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Watched {
    /// Its name.
    pub(super) name: String,
    /// Its cgroup's directory.
    pub(super) cgroup: String,
}

/// What was found on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// `uname -s -m`.
    pub(super) system: String,
    /// Whoever is logged in is root, or becomes it by sudo without being asked.
    pub(super) root: bool,
    /// systemd is process 1.
    pub(super) systemd: bool,
    /// The release that `current` points to.
    pub(super) current: Option<String>,
    /// The wanted release, if it has been installed whole.
    pub(super) copied: Option<String>,
    /// The units that should run do, and they are from `current`.
    pub(super) active: bool,
    /// Files of somebody else where a link of ours would be.
    pub(super) foreign: Vec<String>,
    /// A deployment has brought certificates.
    pub(super) certificates: bool,
    /// What the agent watches.
    pub(super) instances: Vec<Watched>,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is as it should be.
    Nothing,
    /// The release is to be installed; its files have to be copied first, or are there.
    Install { to_copy: bool },
    /// It can't be done.
    Refuse(String),
}

/// Decides.
pub(super) fn next(found: &Found, release: &Release) -> Next {
    let here = format!("Linux {}", std::env::consts::ARCH);
    let refuse = |why: String| Next::Refuse(why);
    if found.system != here {
        return refuse(format!("it is a {}, and the binary is for {here}", found.system));
    }
    if !found.root {
        return refuse(
            "root is needed: deploy to root@HOST, or let the user become root by sudo without a password"
                .into(),
        );
    }
    if !found.systemd {
        return refuse(
            "systemd is not its process 1: nothing there would start the agent anew. Copy the binary, and start `rswap agent` by \
             what supervises services there"
                .into(),
        );
    }
    if let [first, ..] = found.foreign.as_slice() {
        return refuse(format!(
            "{first} is there, and was not made by a deployment: bring it into the directories given here (--config, --pki), \
             move it away, and deploy again"
        ));
    }
    if found.certificates && !release.certificates {
        return refuse(
            "a deployment has brought its certificates: give --pki again, or remove /etc/rswap/tls there"
                .into(),
        );
    }
    if found.current.as_deref() == Some(&release.name) && found.active {
        return Next::Nothing;
    }
    Next::Install { to_copy: found.copied.as_deref() != Some(&release.name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        let directory = std::path::PathBuf::new();
        Release { name: "1-a".into(), directory, files: 4, bytes: 9, certificates: true, controller: false }
    }

    fn fresh() -> Found {
        let system = format!("Linux {}", std::env::consts::ARCH);
        Found { system, root: true, systemd: true, ..Found::default() }
    }

    fn refusal(found: Found) -> String {
        match next(&found, &release()) {
            Next::Refuse(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_runs_is_left_alone_and_what_does_not_is_installed() {
        let (copied, current) = (Some("1-a".to_owned()), Some("1-a".to_owned()));
        assert_eq!(next(&fresh(), &release()), Next::Install { to_copy: true });
        let there = Found { copied, ..fresh() };
        assert_eq!(next(&there, &release()), Next::Install { to_copy: false });
        let other = Found { current: Some("0-b".into()), active: true, ..there.clone() };
        assert_eq!(next(&other, &release()), Next::Install { to_copy: false });
        let dead = Found { current: current.clone(), active: false, ..there.clone() };
        assert_eq!(next(&dead, &release()), Next::Install { to_copy: false }, "it does not run");
        assert_eq!(next(&Found { current, active: true, ..there }, &release()), Next::Nothing);
    }

    #[test]
    fn what_can_not_be_done_is_refused_by_name() {
        assert!(refusal(Found { system: "Linux riscv64".into(), ..fresh() }).contains("riscv64"));
        assert!(refusal(Found { root: false, ..fresh() }).contains("sudo"));
        assert!(refusal(Found { systemd: false, ..fresh() }).contains("systemd is not its process 1"));
        let foreign = Found { foreign: vec!["/etc/rswap/rswap.toml".into()], ..fresh() };
        assert!(refusal(foreign).contains("/etc/rswap/rswap.toml"));
        let bare = Release { certificates: false, ..release() };
        let secured = Found { certificates: true, ..fresh() };
        assert!(matches!(next(&secured, &bare), Next::Refuse(why) if why.contains("--pki")));
        assert_eq!(next(&secured, &release()), Next::Install { to_copy: true });
    }
}
