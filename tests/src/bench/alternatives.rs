//! Profilers that others have: doing what ours does, next to ours.

use std::{
    collections::BTreeSet,
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::profile::{ForeignPrograms, ProgramCost, program_ids};

/// How long a tool may take to load its programs: bpftrace compiles them first.
const STARTS_WITHIN: Duration = Duration::from_secs(20);
/// It has attached them when it has had the same ones for so long.
const SETTLED: Duration = Duration::from_millis(500);
/// It prints what it has counted before it ends, which nobody wants.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A tool that measures what one of the benchmark's measurements is about.
#[derive(Debug, PartialEq, Eq)]
pub struct Tool {
    /// Whose it is: what the result calls the alternative.
    pub of: &'static str,
    /// The program.
    pub program: &'static str,
    /// The package of Debian's that has it.
    pub package: &'static str,
    /// `CGROUP` stands for the path of the cgroup that is measured.
    arguments: &'static [&'static str],
}

const BPFTRACE: &str = "bpftrace";
const BCC: &str = "bcc";
const CGROUP: &str = "CGROUP";

/// As its own `runqlat.bt`, by cgroup: of the one that goes, since it can't tell that of the one that comes.
const BPFTRACE_RUNQLAT: &str = "\
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new { @queued[args->pid] = nsecs; }
tracepoint:sched:sched_switch {
    if (args->prev_state == 0) { @queued[args->prev_pid] = nsecs; }
    $ns = @queued[args->next_pid];
    if ($ns) { @us[cgroup] = hist((nsecs - $ns) / 1000); }
    delete(@queued[args->next_pid]);
}";

/// As its own `biolatency.bt` since that is at tracepoints (Linux 6.5).
const BPFTRACE_BIOLATENCY: &str = "\
tracepoint:block:block_io_start { @start[args->dev, args->sector] = nsecs; }
tracepoint:block:block_io_done /@start[args->dev, args->sector]/ {
    @us = hist((nsecs - @start[args->dev, args->sector]) / 1000);
    delete(@start[args->dev, args->sector]);
}";

/// For how long threads wait for a CPU, by cgroup.
pub static RUN_QUEUE: [Tool; 2] = [
    Tool { of: BPFTRACE, program: "bpftrace", package: "bpftrace", arguments: &["-e", BPFTRACE_RUNQLAT] },
    Tool { of: BCC, program: "runqlat", package: "libbpf-tools", arguments: &["-c", CGROUP] },
];

/// Round trips.
pub static TCP: [Tool; 1] = [Tool { of: BCC, program: "tcprtt", package: "libbpf-tools", arguments: &[] }];

/// How long requests to disks take, of everybody: the end of a request is in nobody's cgroup.
pub static BLOCK: [Tool; 2] = [
    Tool { of: BPFTRACE, program: "bpftrace", package: "bpftrace", arguments: &["-e", BPFTRACE_BIOLATENCY] },
    Tool { of: BCC, program: "biolatency", package: "libbpf-tools", arguments: &[] },
];

impl Tool {
    /// Whether it is on the path.
    pub fn is_installed(&self) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|directory| directory.join(self.program).exists())
    }

    /// Starts it, and waits until its programs are attached.
    ///
    /// # Errors
    /// It does not run here: it may need what this kernel does not have.
    pub fn start(&self, cgroup: &Path) -> anyhow::Result<RunningTool> {
        let cgroup = cgroup.to_str().context("a path that is no text")?;
        let arguments = self.arguments.iter().map(|word| if *word == CGROUP { cgroup } else { word });
        let mut command = Command::new(self.program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program))?;
        let mut running = RunningTool { child };
        running.wait_for_programs().with_context(|| format!("{} of {}", self.program, self.package))?;
        Ok(running)
    }
}

/// A tool with its programs attached. Dropping it ends it.
#[derive(Debug)]
pub struct RunningTool {
    child: Child,
}

impl RunningTool {
    fn wait_for_programs(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + STARTS_WITHIN;
        let (mut known, mut since) = (BTreeSet::new(), Instant::now());
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                let mut said = String::new();
                if let Some(stderr) = &mut self.child.stderr {
                    stderr.read_to_string(&mut said)?;
                }
                bail!("it ended ({status}): {}", said.lines().last().unwrap_or("and said nothing"));
            }
            let now = program_ids(self.child.id());
            if now != known {
                (known, since) = (now, Instant::now());
            } else if !known.is_empty() && since.elapsed() >= SETTLED {
                return Ok(());
            }
            thread::sleep(LOOK_EVERY);
        }
        bail!("it has no programs after {} s", STARTS_WITHIN.as_secs())
    }

    /// What its programs have cost while `measuring` was there.
    pub fn costs(&self, measuring: &ForeignPrograms) -> Vec<ProgramCost> {
        measuring.costs(self.child.id())
    }
}

impl Drop for RunningTool {
    fn drop(&mut self) {
        // Until it is waited for, its number is nobody else's.
        let _ended = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT);
        let deadline = Instant::now() + ENDS_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(LOOK_EVERY);
        }
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}
