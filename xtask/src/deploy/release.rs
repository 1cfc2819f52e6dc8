//! What a host gets: a directory with all of it, named after its content.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
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
    /// Where it is.
    pub(super) directory: PathBuf,
    /// How many files it has.
    pub(super) files: usize,
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
        let mut files = vec![
            ("rswap".to_owned(), binary.to_owned(), 0o755),
            ("rswap.toml".to_owned(), deploy.config.join(format!("{host}.toml")), 0o644),
        ];
        let controller = deploy.controller.as_deref() == Some(host);
        let units: &[&str] = if controller { &["rswap", "rswap-controller"] } else { &["rswap"] };
        for unit in units {
            files.push((format!("{unit}.service"), packaging().join(format!("{unit}.service")), 0o644));
        }
        if let Some(pki) = &deploy.pki {
            fs::create_dir(to.join("tls"))?;
            for (file, mode) in [("ca.pem", 0o644), ("certificate.pem", 0o644), ("key.pem", 0o600)] {
                files.push((format!("tls/{file}"), pki.join("issued").join(host).join(file), mode));
            }
        }
        let mut bytes = 0;
        for (name, from, mode) in &files {
            let to = to.join(name);
            bytes += fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(*mode))?;
        }
        let names = files.iter().map(|(name, ..)| name);
        let _here = shell.push_dir(to);
        let sums =
            cmd!(shell, "sha256sum --binary {names...}").quiet().read().context("sha256sum (coreutils)")?;
        fs::write(to.join(SUMS), format!("{sums}\n"))?;
        let digest = cmd!(shell, "sha256sum --binary {SUMS}").quiet().read()?;
        let digest = digest.get(..12).context("sha256sum said something unexpected")?;
        let version =
            cmd!(shell, "./rswap --version").quiet().read().context("this binary does not run here")?;
        let version = version.split(' ').next_back().unwrap_or_default();
        Ok(Self {
            name: format!("{version}-{digest}"),
            directory: to.to_owned(),
            files: files.len(),
            bytes,
            certificates: deploy.pki.is_some(),
            controller,
        })
    }
}
