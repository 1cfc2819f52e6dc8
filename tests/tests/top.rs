//! `rswap top` in a real terminal, with a real agent behind it.

use std::{process::Command, time::Duration};

use anyhow::{Context, ensure};
use rswap_tests::{Fleet, HostOptions, reason_to_skip, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

/// A terminal of 160 columns and 30 lines, by a tmux of its own. Dropping it ends what runs there.
struct Screen {
    socket: String,
}

impl Screen {
    fn start(socket: String, command: &str) -> anyhow::Result<Self> {
        let screen = Self { socket };
        // What `command` leaves on the screen can be looked at when it has ended.
        let shell = format!("{command}; echo status=$?; sleep 100");
        screen.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-s",
            "top",
            "-x",
            "160",
            "-y",
            "30",
            &shell,
        ])?;
        Ok(screen)
    }

    fn tmux(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new("tmux").args(["-S", &self.socket]).args(arguments).output()?;
        ensure!(output.status.success(), "tmux {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn press(&self, keys: &[&str]) -> anyhow::Result<()> {
        keys.iter().try_for_each(|key| self.tmux(&["send-keys", "-t", "top", key]).map(drop))
    }

    /// Waits until the lines of the screen are as wanted.
    fn wait_for(&self, what: &str, is_it: impl Fn(&[&str]) -> bool) -> anyhow::Result<String> {
        let found = wait_for(what, LIMIT, || {
            let text = self.tmux(&["capture-pane", "-p", "-t", "top"])?;
            Ok(is_it(&text.lines().collect::<Vec<_>>()).then_some(text))
        });
        found.with_context(|| self.tmux(&["capture-pane", "-p", "-t", "top"]).unwrap_or_default())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

fn position(lines: &[&str], name: &str) -> Option<usize> {
    lines.iter().position(|line| line.starts_with(name))
}

#[test]
fn instances_are_watched_ordered_and_looked_at_in_a_terminal() -> anyhow::Result<()> {
    if reason_to_skip("instances_are_watched_ordered_and_looked_at_in_a_terminal").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &HostOptions::default())?;
    host.run("idler", &[], &["sleep", "1000"])?;
    host.run(
        "worker",
        &[],
        &["python3", "-c", "import time\nwhile True:\n    sum(range(20000)); time.sleep(0.001)"],
    )?;
    host.wait_for_instance("idler")?;
    host.wait_for_instance("worker")?;
    let socket = fleet.scratch().join("top.sock").to_string_lossy().into_owned();
    let screen = Screen::start(socket, &format!("{} top --every 200", host.command_line()?))?;

    let cores = |line: &str| line.split_whitespace().nth(2).and_then(|word| word.parse::<f64>().ok());
    screen.wait_for("both instances, by name, and what they use", |lines| {
        let (idler, worker) = (position(lines, "idler"), position(lines, "worker"));
        let (Some(idler), Some(worker)) = (idler, worker) else { return false };
        let used = (cores(lines[idler]), cores(lines[worker]));
        idler < worker && used.0 == Some(0.0) && used.1.is_some_and(|used| used > 0.05)
    })?;
    screen.press(&["c"])?;
    screen.wait_for("the worker to be first", |lines| {
        position(lines, "worker")
            .is_some_and(|worker| position(lines, "idler").is_some_and(|idler| worker < idler))
    })?;
    screen.press(&["/", "i", "d", "l", "Enter"])?;
    screen.wait_for("the idler alone", |lines| {
        position(lines, "idler").is_some() && position(lines, "worker").is_none()
    })?;
    screen.press(&["Escape"])?;
    screen.wait_for("the worker again", |lines| position(lines, "worker").is_some())?;
    screen.press(&["Down", "Enter"])?;
    let seen = screen.wait_for("its distributions", |lines| {
        let text = lines.join("\n");
        text.contains("waiting for a core:") && text.contains('█')
    })?;
    ensure!(seen.contains("worker") && seen.contains("python3"), "another instance is shown: {seen}");

    // Over a minute there are ever more waits, in a window of a second no more than in any.
    let waits = |text: &str| -> Option<u64> {
        text.split_once("waiting for a core: ")?.1.split_once(" times")?.0.parse().ok()
    };
    screen.press(&["s"])?;
    let minute = screen.wait_for("the last minute", |lines| {
        lines[0].contains("times of the last minute")
            && waits(&lines.join("\n")).is_some_and(|waits| waits > 2000)
    })?;
    ensure!(minute.contains("s: last hour"), "the help does not say what is next: {minute}");
    screen.press(&["s"])?;
    let before = waits(&minute);
    screen.wait_for("the last hour", |lines| {
        lines[0].contains("times of the last hour") && waits(&lines.join("\n")) > before
    })?;
    screen.press(&["s"])?;
    screen.wait_for("the last window again", |lines| {
        lines[0].contains("times of the last window")
            && waits(&lines.join("\n")).is_some_and(|waits| waits < 2000)
    })?;

    screen.press(&["PageDown"])?;
    screen.wait_for("what is below", |lines| {
        let text = lines.join("\n");
        text.contains("on a core:") && !text.contains("worker")
    })?;

    // It goes on without the agent, says so, and with the next one.
    screen.press(&["q"])?;
    host.kill_agent()?;
    screen.wait_for("word of the agent's end", |lines| lines[0].contains("does not answer"))?;
    host.start_agent()?;
    screen.wait_for("the next agent", |lines| lines[0].contains("2 instances"))?;
    screen.press(&["q"])?;
    screen.wait_for("the terminal as it was", |lines| lines.iter().any(|line| line.trim() == "status=0"))?;

    let output = host.rswap(&["top"])?.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("needs a terminal"), "without a terminal: {said}");
    host.show_log = false;
    Ok(())
}
