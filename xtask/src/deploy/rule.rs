//! What is to be done with a host, by what was found there. Pure.
//!
//! A host may have been left in the middle of an earlier deployment. What tells is `good`: the release that was last seen to be in order
//! there, and named so on the disk. `current` only says what is started.

use serde::Deserialize;

use super::release::Release;

/// Where certificates are.
const TLS: &str = "/etc/rswap/tls";

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
    /// The release that `previous` points to, if it is there.
    pub(super) previous: Option<String>,
    /// The release that was last in order, if it is there; those that deployed before it was written down have none.
    pub(super) good: Option<String>,
    /// The wanted release, if it is there whole: each file as it was sent.
    pub(super) copied: Option<String>,
    /// The units that should run do, and they are from `current`.
    pub(super) active: bool,
    /// It has a controller's unit of a deployment.
    pub(super) controller: bool,
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
    /// It is what runs: only whether it is in order is to be looked at.
    Check,
    /// The release is to be installed; its files have to be copied first, or are there.
    Install { to_copy: bool },
    /// It can't be done.
    Refuse(String),
}

/// What becomes of a host where the wanted release is not in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Back {
    /// An earlier one is started again.
    To(String),
    /// It stays as it is: nothing is known to be better.
    Stay,
    /// Nothing has ever been in order there: what was made for it to be found goes.
    Remove,
}

/// Decides. `drop_controller`: somebody wants a controller to go.
pub(super) fn next(found: &Found, release: &Release, drop_controller: bool) -> Next {
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
    // Certificates that were brought by hand are left alone by who brings none.
    let in_the_way = |path: &&String| *path != TLS || release.certificates;
    if let Some(path) = found.foreign.iter().find(in_the_way) {
        return refuse(format!(
            "{path} is there, and was not made by a deployment: bring it into the directories given here (--config, --pki), \
             move it away, and deploy again"
        ));
    }
    if found.certificates && !release.certificates {
        return refuse(format!(
            "a deployment has brought its certificates: give --pki again, or remove {TLS} there"
        ));
    }
    if found.controller && !release.controller && !drop_controller {
        return refuse(
            "it runs the fleet's controller: give --controller again, or --drop-controller, by which it is stopped there"
                .into(),
        );
    }
    // Somebody may have changed files of it since: what runs then is not what was wanted.
    let whole = found.copied.as_deref() == Some(&release.name);
    if found.current.as_deref() == Some(&release.name) && found.active && whole {
        return Next::Check;
    }
    Next::Install { to_copy: !whole }
}

/// Decides where to go back to from `release`.
pub(super) fn back(found: &Found, release: &Release) -> Back {
    let other = |name: &&String| **name != release.name;
    if let Some(good) = &found.good {
        return if *good == release.name { Back::Stay } else { Back::To(good.clone()) };
    }
    // Before it was written down what was in order: what ran is the best guess, and what ran before that where this one runs already.
    match (found.current.iter().find(other), found.previous.iter().find(other)) {
        (Some(current), _) => Back::To(current.clone()),
        (None, Some(previous)) => Back::To(previous.clone()),
        (None, None) if found.current.is_some() && found.active => Back::Stay,
        (None, None) => Back::Remove,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        let directory = std::path::PathBuf::new();
        let files = vec!["rswap".to_owned(); 4];
        Release { name: "1-a".into(), directory, files, bytes: 9, certificates: true, controller: false }
    }

    fn fresh() -> Found {
        let system = format!("Linux {}", std::env::consts::ARCH);
        Found { system, root: true, systemd: true, ..Found::default() }
    }

    fn refusal(found: Found) -> String {
        match next(&found, &release(), false) {
            Next::Refuse(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_runs_is_only_looked_at_and_what_does_not_is_installed() {
        let next = |found: &Found| next(found, &release(), false);
        let (copied, current) = (Some("1-a".to_owned()), Some("1-a".to_owned()));
        assert_eq!(next(&fresh()), Next::Install { to_copy: true });
        let there = Found { copied, ..fresh() };
        assert_eq!(next(&there), Next::Install { to_copy: false });
        let other = Found { current: Some("0-b".into()), active: true, ..there.clone() };
        assert_eq!(next(&other), Next::Install { to_copy: false });
        let dead = Found { current: current.clone(), active: false, ..there.clone() };
        assert_eq!(next(&dead), Next::Install { to_copy: false }, "it does not run");
        let changed = Found { current: current.clone(), active: true, ..fresh() };
        assert_eq!(next(&changed), Next::Install { to_copy: true }, "its files are others now");
        let runs = Found { current, active: true, ..there };
        for good in [None, Some("1-a".to_owned()), Some("0-b".to_owned())] {
            assert_eq!(next(&Found { good, ..runs.clone() }), Next::Check, "that it runs says little");
        }
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
        assert!(matches!(next(&secured, &bare, false), Next::Refuse(why) if why.contains("--pki")));
        assert_eq!(next(&secured, &release(), false), Next::Install { to_copy: true });
        // Certificates of somebody else are in the way of ours, and of nothing else.
        let by_hand = Found { foreign: vec![TLS.to_owned()], ..fresh() };
        assert!(refusal(by_hand.clone()).contains(TLS));
        assert_eq!(next(&by_hand, &bare, false), Next::Install { to_copy: true });
        let both = Found { foreign: vec![TLS.to_owned(), "/usr/local/bin/rswap".into()], ..by_hand };
        assert!(
            matches!(next(&both, &bare, false), Next::Refuse(why) if why.contains("/usr/local/bin/rswap"))
        );
    }

    #[test]
    fn a_controller_goes_only_if_that_is_wanted() {
        let has = Found { controller: true, ..fresh() };
        assert!(refusal(has.clone()).contains("--drop-controller"));
        assert_eq!(next(&has, &release(), true), Next::Install { to_copy: true });
        let stays = Release { controller: true, ..release() };
        assert_eq!(next(&has, &stays, false), Next::Install { to_copy: true });
    }

    #[test]
    fn the_way_back_is_to_what_was_in_order_whatever_a_deployment_that_was_cut_off_has_left() {
        let (new, old, older) = ("1-a", "0-b", "0-c");
        let releases = [None, Some(new), Some(old), Some(older)];
        let mut seen = 0;
        for good in releases {
            for current in releases {
                for previous in releases {
                    for active in [false, true] {
                        let own = |name: Option<&str>| name.map(str::to_owned);
                        let (good, current, previous) = (own(good), own(current), own(previous));
                        let found = Found { good, current, previous, active, ..fresh() };
                        let back = back(&found, &release());
                        let name = |name: &Option<String>| name.clone().filter(|name| name != new);
                        let expected = match (&found.good, name(&found.current), name(&found.previous)) {
                            // It was in order before, or nothing was: neither is a reason to take away what is there.
                            (Some(good), _, _) if good == new => Back::Stay,
                            (Some(good), _, _) => Back::To(good.clone()),
                            (None, Some(current), _) => Back::To(current),
                            (None, None, Some(previous)) => Back::To(previous),
                            (None, None, None) if found.current.is_some() && active => Back::Stay,
                            (None, None, None) => Back::Remove,
                        };
                        assert_eq!(back, expected, "{found:?}");
                        assert_ne!(
                            back,
                            Back::To(new.to_owned()),
                            "there is no way back to itself: {found:?}"
                        );
                        let something = found.good.is_some() || (found.current.is_some() && active);
                        assert!(back != Back::Remove || !something, "what works is not removed: {found:?}");
                        seen += 1;
                    }
                }
            }
        }
        assert_eq!(seen, 128);
    }
}
