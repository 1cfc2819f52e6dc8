//! Two processes that answer each other, one turn after the other, in a cgroup of their own: over pipes, or over TCP.
//!
//! Both are on one core and real-time, so that nobody else's work is between two turns. The benchmark's own binary plays
//! them: `play pipe` and `play tcp` take a number of turns from standard input and answer with the nanoseconds that these took.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write, stdin},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use rswap_agent::instance::cgroup;

use crate::sweep;

/// How long a program may take to be in its cgroup.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of a request over TCP, and of its answer.
const MESSAGE: usize = 64;
/// Real-time priority of the players; any is above all ordinary work.
const PRIORITY: &str = "50";

/// What a player does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Asks over a pipe.
    Pipe,
    /// Asks over TCP.
    Tcp,
    /// Answers on standard output what comes on standard input.
    Echo,
    /// Answers over TCP.
    TcpEcho,
}

/// Plays a role until its input ends.
///
/// # Errors
/// The partner has gone.
pub fn play(role: Role, address: Option<&str>) -> anyhow::Result<()> {
    match role {
        Role::Pipe => {
            let mut partner =
                own(Role::Echo)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("a partner")?;
            let mut to = partner.stdin.take().context("no pipe")?;
            let mut from = partner.stdout.take().context("no pipe")?;
            let mut byte = [1];
            turns(|| {
                to.write_all(&byte)?;
                from.read_exact(&mut byte)
            })?;
            drop(to);
            partner.wait()?;
        }
        Role::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let at = listener.local_addr()?.to_string();
            let mut partner = own(Role::TcpEcho)?.args(["--address", &at]).stdin(Stdio::null()).spawn()?;
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut message = [1; MESSAGE];
            turns(|| {
                stream.write_all(&message)?;
                stream.read_exact(&mut message)
            })?;
            drop(stream);
            partner.wait()?;
        }
        Role::Echo => echo(std::io::stdin(), std::io::stdout(), &mut [0; 1]),
        Role::TcpEcho => {
            let stream = TcpStream::connect(address.context("no address")?)?;
            stream.set_nodelay(true)?;
            echo(&stream, &stream, &mut [0; MESSAGE]);
        }
    }
    Ok(())
}

fn own(role: Role) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["play", role.to_possible_value().context("a role")?.get_name()]);
    Ok(command)
}

fn echo(mut from: impl Read, mut to: impl Write, message: &mut [u8]) {
    while from.read_exact(message).is_ok() && to.write_all(message).and_then(|()| to.flush()).is_ok() {}
}

fn turns(mut turn: impl FnMut() -> std::io::Result<()>) -> anyhow::Result<()> {
    for line in stdin().lock().lines() {
        let count: u64 = line?.trim().parse().context("not a number of turns")?;
        let began = Instant::now();
        for _ in 0..count {
            turn()?;
        }
        println!("{}", began.elapsed().as_nanos());
    }
    Ok(())
}

/// A cgroup of the benchmark's own. All that is in it is killed when it is dropped.
#[derive(Debug)]
pub struct OwnCgroup(PathBuf);

impl OwnCgroup {
    /// Makes it.
    ///
    /// # Errors
    /// There is no cgroup v2, or no right to make one.
    pub fn new(what: &str) -> anyhow::Result<Self> {
        let path = cgroup::mount_point()?.join(sweep::own_name(what));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Starts a command in the cgroup, and waits until it is there: then it can be adopted.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self, command: &[&str]) -> anyhow::Result<Child> {
        let child = self.command(command).stdin(Stdio::null()).spawn()?;
        crate::wait_for("a program to be in its cgroup", STARTS_WITHIN, || {
            Ok(cgroup::is_populated(&self.0)?.then_some(()))
        })?;
        Ok(child)
    }

    /// A command that is in the cgroup from its first instruction on.
    pub fn command(&self, command: &[&str]) -> Command {
        let mut shell = Command::new("sh");
        let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        shell.args(["-c", &join, "sh"]).args(command);
        shell
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        if let Err(error) = sweep::remove_cgroup(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

/// Two that play, in a cgroup.
#[derive(Debug)]
pub struct Players {
    cgroup: OwnCgroup,
    asking: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Players {
    /// Starts them on a core.
    ///
    /// # Errors
    /// They don't start: real-time priority needs root.
    pub fn start(role: Role, core: usize) -> anyhow::Result<Self> {
        let name = role.to_possible_value().context("a role")?;
        let cgroup = OwnCgroup::new(name.get_name())?;
        let (exe, core) = (std::env::current_exe()?, core.to_string());
        let exe = exe.to_str().context("a path that is no text")?;
        let command = [
            "chrt",
            "--fifo",
            PRIORITY,
            "taskset",
            "--cpu-list",
            core.as_str(),
            exe,
            "play",
            name.get_name(),
        ];
        let mut asking =
            cgroup.command(&command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("chrt")?;
        let to = asking.stdin.take().context("no pipe")?;
        let from = BufReader::new(asking.stdout.take().context("no pipe")?);
        let mut players = Self { cgroup, asking, to, from };
        players.turn_ns(1000)?;
        Ok(players)
    }

    /// Their cgroup.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Plays so many turns; nanoseconds for each.
    ///
    /// # Errors
    /// A player has ended.
    pub fn turn_ns(&mut self, count: u32) -> anyhow::Result<f64> {
        writeln!(self.to, "{count}").context("a player has ended")?;
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        let ns: f64 = line.trim().parse().context("a player has ended")?;
        ensure!(count > 0 && ns > 0.0, "no time has passed");
        Ok(ns / f64::from(count))
    }

    /// The same in so many slices, of which the quickest counts: what a machine does beside only ever adds time.
    ///
    /// # Errors
    /// A player has ended.
    pub fn quickest_turn_ns(&mut self, count: u32, slices: u32) -> anyhow::Result<f64> {
        let each = (count / slices.max(1)).max(1);
        (0..slices.max(1)).try_fold(f64::MAX, |least, _| Ok(least.min(self.turn_ns(each)?)))
    }
}

impl Drop for Players {
    fn drop(&mut self) {
        let _ = self.asking.kill();
        let _ = self.asking.wait();
    }
}
