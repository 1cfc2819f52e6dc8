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

/// What measures what one of the benchmark's measurements is about.
#[derive(Debug, PartialEq, Eq)]
pub struct Tool {
    /// Whose it is: what the result calls the alternative.
    pub of: &'static str,
    /// The package of Debian's that has it.
    pub package: &'static str,
    /// They run beside each other.
    commands: &'static [ToolCommand],
}

#[derive(Debug, PartialEq, Eq)]
struct ToolCommand {
    program: &'static str,
    /// `CGROUP` stands for the path of the cgroup that is measured.
    arguments: &'static [&'static str],
}

impl ToolCommand {
    const fn new(program: &'static str, arguments: &'static [&'static str]) -> Self {
        Self { program, arguments }
    }
}

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

/// Round trips of everybody, since an answer comes in nobody's cgroup, and what is sent and read, by cgroup. At tracepoints (Linux 6.3), as not every kernel has
/// kprobes; 6 is TCP, and 2 a look at what is read again later.
const BPFTRACE_TCP: &str = "\
tracepoint:tcp:tcp_probe { @us = hist(args->srtt); }
tracepoint:sock:sock_send_length /args->protocol == 6 && args->ret > 0/ { @sent[cgroup] = sum(args->ret); }
tracepoint:sock:sock_recv_length /args->protocol == 6 && args->ret > 0 && (args->flags & 2) == 0/ {
    @read[cgroup] = sum(args->ret);
}";

const fn bpftrace(commands: &'static [ToolCommand]) -> Tool {
    Tool { of: "bpftrace", package: "bpftrace", commands }
}

const fn bcc(commands: &'static [ToolCommand]) -> Tool {
    Tool { of: "bcc", package: "libbpf-tools", commands }
}

/// For how long threads wait for a CPU, by cgroup.
pub static RUN_QUEUE: [Tool; 2] = [
    bpftrace(&[ToolCommand::new("bpftrace", &["-e", BPFTRACE_RUNQLAT])]),
    bcc(&[ToolCommand::new("runqlat", &["-c", CGROUP])]),
];

/// Round trips, and how much goes over connections.
pub static TCP: [Tool; 2] = [
    bpftrace(&[ToolCommand::new("bpftrace", &["-e", BPFTRACE_TCP])]),
    bcc(&[ToolCommand::new("tcprtt", &[]), ToolCommand::new("tcptop", &["--noclear", "-c", CGROUP])]),
];

/// How long requests to disks take, of everybody: the end of a request is in nobody's cgroup.
pub static BLOCK: [Tool; 2] = [
    bpftrace(&[ToolCommand::new("bpftrace", &["-e", BPFTRACE_BIOLATENCY])]),
    bcc(&[ToolCommand::new("biolatency", &[])]),
];

impl Tool {
    /// Its programs, by name.
    pub fn programs(&self) -> String {
        self.commands.iter().map(|command| command.program).collect::<Vec<_>>().join(" and ")
    }

    /// Whether all of it is on the path.
    pub fn is_installed(&self) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let has = |of: &ToolCommand| std::env::split_paths(&path).any(|at| at.join(of.program).exists());
        self.commands.iter().all(has)
    }

    /// Starts it, and waits until its programs are attached.
    ///
    /// # Errors
    /// It does not run here: it may need what this kernel does not have.
    pub fn start(&self, cgroup: &Path) -> anyhow::Result<RunningTool> {
        let cgroup = cgroup.to_str().context("a path that is no text")?;
        let mut running = RunningTool { children: Vec::new() };
        for ToolCommand { program, arguments } in self.commands {
            let arguments = arguments.iter().map(|word| if *word == CGROUP { cgroup } else { word });
            let mut command = Command::new(program);
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            running.children.push(command.spawn().with_context(|| format!("cannot start {program}"))?);
        }
        for (child, of) in running.children.iter_mut().zip(self.commands) {
            wait_for_programs(child).with_context(|| format!("{} of {}", of.program, self.package))?;
        }
        Ok(running)
    }
}

fn wait_for_programs(child: &mut Child) -> anyhow::Result<()> {
    let deadline = Instant::now() + STARTS_WITHIN;
    let (mut known, mut since) = (BTreeSet::new(), Instant::now());
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            let mut said = String::new();
            if let Some(stderr) = &mut child.stderr {
                stderr.read_to_string(&mut said)?;
            }
            bail!("it ended ({status}): {}", said.lines().last().unwrap_or("and said nothing"));
        }
        let now = program_ids(child.id());
        if now != known {
            (known, since) = (now, Instant::now());
        } else if !known.is_empty() && since.elapsed() >= SETTLED {
            return Ok(());
        }
        thread::sleep(LOOK_EVERY);
    }
    bail!("it has no programs after {} s", STARTS_WITHIN.as_secs())
}

/// A tool with its programs attached. Dropping it ends it.
#[derive(Debug)]
pub struct RunningTool {
    children: Vec<Child>,
}

impl RunningTool {
    /// What its programs have cost while `measuring` was there.
    pub fn costs(&self, measuring: &ForeignPrograms) -> Vec<ProgramCost> {
        self.children.iter().flat_map(|child| measuring.costs(child.id())).collect()
    }
}

impl Drop for RunningTool {
    fn drop(&mut self) {
        for child in &self.children {
            // Until it is waited for, its number is nobody else's.
            let _ended = kill(Pid::from_raw(child.id() as i32), Signal::SIGINT);
        }
        let deadline = Instant::now() + ENDS_WITHIN;
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(LOOK_EVERY);
            }
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}
