//! An interactive shell with its jobs moves: a pipeline that runs, one that is stopped, and one in the foreground.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::ensure;
use rswap_tests::{
    moves::{LIMIT, Pair, program},
    reason_to_skip, wait_for,
};

/// Somebody who types, and reads what is printed.
struct Typist {
    log: PathBuf,
    /// How much of the log was read.
    read: Cell<usize>,
}

impl Typist {
    fn types(&self, text: &str) -> anyhow::Result<()> {
        let (keys, ready) = (self.log.with_extension("log.keys"), self.log.with_extension("log.type"));
        fs::write(&keys, text)?;
        fs::rename(&keys, &ready)?;
        wait_for("the keys to be typed", LIMIT, || Ok((!ready.exists()).then_some(())))
    }

    /// Waits until `text` is printed, after what was seen before.
    fn sees(&self, text: &str) -> anyhow::Result<()> {
        let printed = || fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let seen = wait_for(&format!("the shell to print {text:?}"), LIMIT, || {
            let all = printed()?;
            let rest = all.get(self.read.get()..).unwrap_or_default();
            Ok(rest.find(text).map(|at| self.read.get() + at + text.len()))
        });
        match seen {
            Ok(end) => self.read.set(end),
            Err(error) => anyhow::bail!("{error}; it printed {}", printed()?),
        }
        Ok(())
    }

    /// Lets a job run in the foreground, and types half a line for it.
    fn begins_a_line(&self) -> anyhow::Result<()> {
        self.types("cat\n")?;
        self.sees("cat\r\n")?;
        self.types("half")?;
        self.sees("half")
    }

    /// Types the rest of the line, and does something with every job. `stream` is what the first one writes.
    fn goes_on(&self, stream: &Path) -> anyhow::Result<()> {
        goes_on(stream)?;
        let says = |text: &str, sees: &[&str]| {
            self.types(text)?;
            sees.iter().try_for_each(|text| self.sees(text))
        };
        says(" line\n", &[" line\r\nhalf line\r\n"])?;
        says("\x1a", &["Stopped", "ready> "])?;
        says("echo r$(jobs -rp | wc -l) s$(jobs -sp | wc -l)\n", &["r2 s2\r\n", "ready> "])?;
        says("fg %4\n", &["cat\r\n"])?;
        says("again\n", &["again\r\nagain\r\n"])?;
        says("\x03", &["ready> "])?;
        says("kill -STOP %1\n", &["ready> "])?;
        // The shell has sent the signal, and its last numbers are on their way to the file.
        thread::sleep(Duration::from_millis(200));
        let stopped = numbers(stream)?;
        thread::sleep(Duration::from_millis(200));
        ensure!(numbers(stream)? == stopped, "a job that is stopped goes on");
        says("bg %3; jobs -r\n", &["[2]", "[3]", "ready> "])?;
        says("kill -STOP %3; bg %1\n", &["ready> "])?;
        goes_on(stream)
    }
}

/// The numbers that the running pipeline has written: each one more than the last.
fn numbers(path: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut last = 0;
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        ensure!(line == (last + 1).to_string(), "{line} came where {} was due", last + 1);
        last += 1;
    }
    Ok(last)
}

fn goes_on(path: &Path) -> anyhow::Result<()> {
    let before = numbers(path)?;
    wait_for("a hundred further numbers", LIMIT, || Ok((numbers(path)? >= before + 100).then_some(())))
}

#[test]
fn a_shell_keeps_its_jobs() -> anyhow::Result<()> {
    if reason_to_skip("a_shell_keeps_its_jobs").is_some() {
        return Ok(());
    }
    let pair = Pair::new()?;
    let scratch = pair.fleet.scratch();
    let typist = Typist { log: scratch.join("terminal.log"), read: Cell::new(0) };
    let path = |name: &str| scratch.join(name).to_string_lossy().into_owned();
    let words =
        [program("terminal.py").to_string_lossy().into_owned(), typist.log.to_string_lossy().into_owned()];
    let shell = ["env", "TERM=dumb", "bash", "--norc", "--noprofile", "-i"];
    let command: Vec<&str> = [&["python3", &words[0], &words[1]], &shell[..]].concat();
    pair.a.run("shell", &[], &command)?;
    let (stream, gate, sorted) = (path("stream"), path("gate"), path("sorted"));
    for line in [
        // Not as it is printed, so that it is found only there.
        "bind 'set enable-bracketed-paste off'; PS1='re''ady> '".to_owned(),
        format!("seq 1 100000000 | while read n; do echo $n; sleep 0.002; done | cat | cat >> {stream} &"),
        // Its first process ends at once, and its last one says something at the end only.
        format!(
            "seq 1 3000 | while read n; do [ -e {gate} ] || sleep 0.05; echo $n; done | sort -rn | cksum >> {sorted} &"
        ),
    ] {
        typist.types(&format!("{line}\n"))?;
        typist.sees("ready> ")?;
    }
    typist.types("while :; do sleep 0.01; done | cat\n")?;
    typist.sees("| cat\r\n")?;
    goes_on(Path::new(&stream))?;
    typist.types("\x1a")?;
    typist.sees("ready> ")?;
    typist.begins_a_line()?;
    pair.three_moves_and("shell", || {
        typist.goes_on(Path::new(&stream))?;
        typist.begins_a_line()
    })?;
    fs::write(&gate, "")?;
    let sum = Command::new("sh").args(["-c", "seq 3000 -1 1 | cksum"]).output()?;
    wait_for("the sorted lines' sum", LIMIT, || {
        Ok((!fs::read(&sorted).unwrap_or_default().is_empty()).then_some(()))
    })?;
    assert_eq!(fs::read_to_string(&sorted)?, String::from_utf8(sum.stdout)?);
    Ok(())
}
