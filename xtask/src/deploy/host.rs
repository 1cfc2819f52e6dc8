//! One host, over ssh: each step is a script that its shell runs as root.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use xshell::{Cmd, Shell, cmd};

use super::{
    Deploy,
    release::Release,
    rule::{Found, Watched},
};

/// What all scripts begin with.
const PRELUDE: &str = include_str!("host.sh");

/// A host that is deployed to.
pub(super) struct Host<'a> {
    shell: &'a Shell,
    deploy: &'a Deploy,
    target: &'a str,
    /// What makes a command root's: nothing, or sudo.
    become_root: Vec<&'static str>,
    is_root: bool,
}

impl<'a> Host<'a> {
    /// Logs in once, to see as whom.
    pub(super) fn new(shell: &'a Shell, deploy: &'a Deploy, target: &'a str) -> anyhow::Result<Self> {
        let mut host = Self { shell, deploy, target, become_root: Vec::new(), is_root: true };
        let user = host.ssh(&["id", "-u"]).read().with_context(|| format!("cannot log in to {target}"))?;
        if user.trim() != "0" {
            host.is_root = host.ssh(&["sudo", "-n", "true"]).ignore_stderr().run().is_ok();
            // Otherwise it is looked at as whoever it is, and refused.
            host.become_root = if host.is_root { vec!["sudo", "-n"] } else { Vec::new() };
        }
        Ok(host)
    }

    /// As it was named.
    pub(super) fn target(&self) -> &str {
        self.target
    }

    /// Options of ssh and scp. A password can't be asked for in the middle, and a host that is gone is not waited for.
    fn options(&self) -> Vec<String> {
        let mut options = vec!["-o".to_owned(), "BatchMode=yes".to_owned()];
        for keeps in ["ServerAliveInterval=5", "ServerAliveCountMax=6"] {
            options.extend(["-o".to_owned(), keeps.to_owned()]);
        }
        if let Some(file) = &self.deploy.ssh_config {
            options.extend(["-F".to_owned(), file.display().to_string()]);
        }
        options
    }

    fn ssh(&self, words: &[&str]) -> Cmd<'a> {
        let (shell, target, options) = (self.shell, self.target, self.options());
        cmd!(shell, "ssh {options...} {target} {words...}").quiet()
    }

    /// Has root's shell there run the function `call` of the prelude, with arguments that need no quoting.
    fn call(&self, call: &str) -> anyhow::Result<String> {
        let words = [self.become_root.as_slice(), &["sh", "-s"]].concat();
        let script = format!("{PRELUDE}\n{call}\n");
        let output = self.ssh(&words).stdin(script).ignore_status().output()?;
        let (said, problem) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}", [problem.trim(), said.trim()].join(" ").trim());
        Ok(said.into_owned())
    }

    /// Looks, and touches nothing.
    pub(super) fn look(&self, release: &Release) -> anyhow::Result<Found> {
        let mut found = Found { root: self.is_root, ..Found::default() };
        let text = self.call(&format!("look {}", release.name));
        for line in text.context("cannot look at it")?.lines() {
            match line.split_once('=') {
                Some(("system", value)) => found.system = value.to_owned(),
                Some(("systemd", _)) => found.systemd = true,
                Some(("certificates", _)) => found.certificates = true,
                Some(("current", value)) => found.current = Some(value.to_owned()),
                Some(("previous", value)) => found.previous = Some(value.to_owned()),
                Some(("good", value)) => found.good = Some(value.to_owned()),
                Some(("controller", _)) => found.controller = true,
                Some(("copied", value)) => found.copied = Some(value.to_owned()),
                Some(("active", _)) => found.active = true,
                Some(("foreign", value)) => found.foreign.push(value.to_owned()),
                Some(("instances", value)) => found.instances = instances(value)?,
                // What a login says by itself.
                _ => {}
            }
        }
        Ok(found)
    }

    /// Brings the release, whole: as a stream from where its files are into root's own directory there. There is no copy in between that
    /// an end of either side could leave behind.
    pub(super) fn copy(&self, release: &Release) -> anyhow::Result<()> {
        let mut archive = Command::new("tar");
        archive.args(["-c", "-f", "-", "--dereference", "-C"]).arg(&release.directory).args(&release.files);
        let mut archive = archive.stdout(Stdio::piped()).spawn().context("cannot start tar")?;
        let from = archive.stdout.take().context("tar has no output")?;
        // Its input is the archive, so the script is a word.
        let script = quoted(&format!("{PRELUDE}\nreceive {}\n", release.name));
        let words = [self.become_root.as_slice(), &["sh", "-c", &script]].concat();
        let mut command = Command::new("ssh");
        command.args(self.options()).arg(self.target).args(words).stdin(Stdio::from(from));
        let received = command.output().context("cannot start ssh")?;
        // `command` still holds the other end of what tar writes to.
        drop(command);
        let sent = archive.wait().context("cannot wait for tar")?;
        let problem = String::from_utf8_lossy(&received.stderr);
        ensure!(received.status.success(), "cannot copy it there: {}", problem.trim());
        ensure!(sent.success(), "tar could not read all of it: {sent}");
        Ok(())
    }

    /// Has the binary read the configuration there.
    pub(super) fn try_out(&self, release: &Release) -> anyhow::Result<()> {
        self.call(&format!("try_out {}", release.name)).map(drop)
    }

    /// Makes the release `name` the one that runs.
    pub(super) fn switch(&self, name: &str) -> anyhow::Result<()> {
        self.call(&format!("switch {name}")).map(drop)
    }

    /// Waits until the agent of the release `name` is in order, and its controller if it has one; those of `before` that it does not watch
    /// must have ended.
    pub(super) fn health(&self, name: &str, before: &[Watched]) -> anyhow::Result<()> {
        let within = self.deploy.within;
        let said = self.call(&format!("health {name} {within}"))?;
        let now = said.lines().find_map(|line| line.strip_prefix("instances=")).unwrap_or_default();
        let now = instances(now)?;
        let lost: Vec<_> = before.iter().filter(|was| !now.iter().any(|is| is.name == was.name)).collect();
        for Watched { name, cgroup } in lost {
            let ended = self.call(&format!("has_ended {}", quoted(cgroup))).is_ok();
            ensure!(ended, "the instance {name} runs, and is not watched any longer");
            println!("    {name} has ended, or was moved, meanwhile");
        }
        Ok(())
    }

    /// What the agent has logged last.
    pub(super) fn last_words(&self) -> String {
        self.call("last_words").unwrap_or_default()
    }

    /// Stops the agent, and removes all that was made for it to be found.
    pub(super) fn remove(&self) -> anyhow::Result<()> {
        self.call("remove").map(drop)
    }

    /// Writes down that the release `name` is in order, and that the one before it is now `before`, and makes room: both are kept.
    pub(super) fn settle(&self, name: &str, before: Option<&str>) -> anyhow::Result<()> {
        self.call(&format!("settle {name} {}", before.unwrap_or_default())).map(drop)
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Reads what `rswap ps --json` says; nothing, where no agent answers.
fn instances(json: &str) -> anyhow::Result<Vec<Watched>> {
    if json.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(json).context("`rswap ps --json` said something unexpected")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        assert_eq!(quoted("/sys/fs/cgroup/it's"), r"'/sys/fs/cgroup/it'\''s'");
    }

    #[test]
    fn instances_are_read_with_whatever_else_is_said_of_them() {
        let said = r#"[{"name": "db", "cgroup": "/sys/fs/cgroup/rswap/db", "pool": null}]"#;
        let db = Watched { name: "db".into(), cgroup: "/sys/fs/cgroup/rswap/db".into() };
        assert_eq!(instances(said).unwrap(), [db]);
        assert_eq!(instances("").unwrap(), []);
        assert!(instances("no").is_err());
    }
}
