//! What a host gets: a directory with all of it, named after its content.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use xshell::{Shell, cmd};

use super::{Deploy, packaging};

/// The list of what is in a release, as sha256sum(1) reads it.
pub(super) const SUMS: &str = "SHA256SUMS";

/// One host's release, as it is on this machine.
#[derive(Debug)]
pub(super) struct Release {
    /// Version of the program, and the beginning of the digest of everything: the same for the same content.
    pub(super) name: String,
    /// Where it is. What is in it are links: nothing of a key is ever written here, so nothing of it can be left behind.
    pub(super) directory: PathBuf,
    /// The names of its files, from there.
    pub(super) files: Vec<String>,
    /// How much that is.
    pub(super) bytes: u64,
    /// Certificates come with it.
    pub(super) certificates: bool,
    /// The host is to run the controller as well.
    pub(super) controller: bool,
}

/// The host of `USER@HOST`.
pub(super) fn host_name(target: &str) -> &str {
    target.rsplit_once('@').map_or(target, |(_, host)| host)
}

impl Release {
    /// Puts together what `host` gets, in the new directory `to`.
    pub(super) fn stage(
        shell: &Shell,
        deploy: &Deploy,
        binary: &Path,
        host: &str,
        to: &Path,
    ) -> anyhow::Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ensure!(host.chars().all(plain) && !host.starts_with(['.', '-']), "{host:?} is no name of a host");
        fs::create_dir_all(to)?;
        // Small ones first, in the order in which they are sent: what is cut off is mostly cut off in the binary, with all the others
        // there, the key among them.
        let mut files = Vec::new();
        if let Some(pki) = &deploy.pki {
            fs::create_dir(to.join("tls"))?;
            for file in ["ca.pem", "certificate.pem", "key.pem"] {
                files.push((format!("tls/{file}"), pki.join("issued").join(host).join(file)));
            }
        }
        files.push(("rswap.toml".to_owned(), deploy.config.join(format!("{host}.toml"))));
        let controller = deploy.controller.as_deref() == Some(host);
        let units: &[&str] = if controller { &["rswap", "rswap-controller"] } else { &["rswap"] };
        for unit in units {
            files.push((format!("{unit}.service"), packaging().join(format!("{unit}.service"))));
        }
        files.push(("rswap".to_owned(), binary.to_owned()));
        let mut bytes = 0;
        for (name, from) in &files {
            let missing = || format!("cannot find {}", from.display());
            let from = fs::canonicalize(from).with_context(missing)?;
            let found = fs::metadata(&from).with_context(missing)?;
            ensure!(found.is_file(), "{} is no file", from.display());
            bytes += found.len();
            symlink(&from, to.join(name))?;
        }
        let mut files: Vec<String> = files.into_iter().map(|(name, _)| name).collect();
        let names = &files;
        let _here = shell.push_dir(to);
        let sums =
            cmd!(shell, "sha256sum --binary {names...}").quiet().read().context("sha256sum (coreutils)")?;
        fs::write(to.join(SUMS), format!("{sums}\n"))?;
        let digest = cmd!(shell, "sha256sum --binary {SUMS}").quiet().read()?;
        let digest = digest.get(..12).context("sha256sum said something unexpected")?;
        let version =
            cmd!(shell, "./rswap --version").quiet().read().context("this binary does not run here")?;
        let version = version.split(' ').next_back().unwrap_or_default();
        let name = format!("{version}-{digest}");
        files.push(SUMS.to_owned());
        Ok(Self {
            name,
            directory: to.to_owned(),
            files,
            bytes,
            certificates: deploy.pki.is_some(),
            controller,
        })
    }
}
