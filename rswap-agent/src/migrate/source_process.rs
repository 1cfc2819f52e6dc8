//! One process of an instance that is being moved away.

use std::time::Duration;

use super::volumes::SourceVolumes;
use crate::tracee::{
    TraceeError,
    crew::Hand,
    layout::{self, Layout, Mapping, ProcessLayout},
    read_proc,
    stopped::StoppedProcess,
    tables::Tables,
    terminals,
    tracker::{Kind, Span, Tracker, WrittenSpans},
    tree::Member,
};

/// Programs that a process may execute during one look before it is given up.
const EXECUTIONS: usize = 5;
/// Between two looks at one that is doing so.
const NAP: Duration = Duration::from_millis(1);

/// A living process, its writes tracked.
#[derive(Debug)]
pub struct SourceProcess {
    /// Its number as an address space.
    pub space: u32,
    /// Its pids and its place in the tree.
    pub member: Member,
    /// Every thread held still, once it is frozen,
    pub stopped: Option<StoppedProcess>,
    /// by this one of ours.
    pub hand: Option<Hand>,
    /// Its own mappings at the last look.
    pub mappings: Vec<Mapping>,
    kernel_mappings: Vec<Mapping>,
    huge_pages_off: bool,
    /// The number of the pseudo-terminal that controls the session that it leads.
    terminal: Option<u32>,
    tracker: Option<Tracker>,
    program: Program,
}

/// What changes when a process executes another program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Program(Vec<String>);

impl Program {
    /// Where code, stack and arguments begin (proc_pid_stat(5), fields 26, 28 and 48): drawn anew at every execve(2).
    fn read(pid: i32) -> Result<Self, TraceeError> {
        let text = read_proc(&format!("/proc/{pid}/stat"))?;
        let after_name = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).map(|word| (*word).to_owned());
        Ok(Self([26, 28, 48].into_iter().filter_map(field).collect()))
    }
}

impl SourceProcess {
    /// A process that was just found; nothing of it is tracked yet.
    pub fn new(space: u32, member: Member) -> Self {
        Self {
            space,
            member,
            stopped: None,
            hand: None,
            mappings: Vec::new(),
            kernel_mappings: Vec::new(),
            huge_pages_off: false,
            terminal: None,
            tracker: None,
            program: Program::default(),
        }
    }

    /// Its pid as the agent sees it.
    pub fn pid(&self) -> i32 {
        self.member.pid
    }

    /// The kernel's own mappings at the last look.
    pub fn kernel_mappings(&self) -> &[Mapping] {
        &self.kernel_mappings
    }

    /// Stops every thread; `false` when they were stopped before.
    pub fn stop(&mut self) -> Result<bool, TraceeError> {
        if self.stopped.is_some() {
            return Ok(false);
        }
        self.stopped = Some(StoppedProcess::stop(self.pid())?);
        Ok(true)
    }

    /// What it wrote since the last call, and whether it executes another program since then, which drops all that was
    /// there.
    pub fn take_written(&mut self) -> Result<(WrittenSpans, bool), TraceeError> {
        let mut replaced = false;
        for _ in 0..EXECUTIONS {
            let program = Program::read(self.pid())?;
            if program != self.program {
                replaced |= self.tracker.take().is_some();
                self.program = program;
            }
            match self.try_take_written() {
                // In execve(2) the kernel maps its own one after the other.
                Ok(_) if self.stopped.is_none() && !self.has_kernel_mappings()? => {
                    self.tracker = None;
                    replaced = true;
                    std::thread::sleep(NAP);
                }
                Ok(written) => return Ok((written, replaced)),
                // It may be executing another program at this very moment: the old one's memory is gone then.
                Err(_) if self.stopped.is_none() && Program::read(self.pid())? != self.program => {}
                Err(error) => return Err(error),
            }
        }
        let text = format!("process {} executes one program after the other", self.pid());
        Err(TraceeError::Unsupported(text))
    }

    fn try_take_written(&mut self) -> Result<WrittenSpans, TraceeError> {
        let pid = self.pid();
        let tracker = match self.tracker.take() {
            Some(tracker) => self.tracker.insert(tracker),
            None if self.stopped.is_some() => self.tracker.insert(Tracker::of_stopped(pid)?),
            None => self.tracker.insert(Tracker::start(pid)?),
        };
        let written = match self.stopped {
            Some(_) => tracker.take_last_written()?,
            None => tracker.take_written()?,
        };
        self.mappings.clone_from(&written.mappings);
        self.kernel_mappings.clone_from(&written.kernel_mappings);
        let leads = self.member.node.session == self.member.node.pid;
        self.terminal = if leads { terminals::controlling(pid)? } else { None };
        let status = read_proc(&format!("/proc/{pid}/status"))?;
        self.huge_pages_off = status.lines().any(|line| line.split_whitespace().eq(["THP_enabled:", "0"]));
        Ok(written)
    }

    /// Whether the kernel has mapped as much of its own here as into this program.
    fn has_kernel_mappings(&self) -> Result<bool, TraceeError> {
        let all = layout::read_mappings(std::process::id() as i32)?;
        let ours = all.iter().filter(|mapping| mapping.is_kernels_own());
        Ok(ours.map(|mapping| &mapping.name).eq(self.kernel_mappings.iter().map(|mapping| &mapping.name)))
    }

    /// Its address space as the last look found it.
    pub fn layout(&self) -> ProcessLayout {
        ProcessLayout {
            space: self.space,
            node: self.member.node,
            kernel_mappings: self.kernel_mappings.clone(),
            layout: Layout { mappings: self.mappings.clone(), huge_pages_off: self.huge_pages_off },
            terminal: self.terminal,
            tables: Tables { descriptors: self.space, directories: self.space },
        }
    }

    /// Of what was written, all but private pages of files in volumes, which are mapped at the destination only in the
    /// freeze (`frozen`): then all of them are in it.
    pub fn without_files_of(
        &mut self,
        volumes: &SourceVolumes,
        mut written: Vec<Span>,
        frozen: bool,
    ) -> Result<Vec<Span>, TraceeError> {
        let held = self.mappings.iter().filter(|mapping| !mapping.shared && volumes.hold(mapping));
        let held: Vec<Span> = held.map(|mapping| mapping.start..mapping.end).collect();
        written.retain(|span| !held.iter().any(|held| held.contains(&span.start)));
        if let Some(tracker) = self.tracker.as_mut().filter(|_| frozen) {
            for span in &held {
                written.extend(tracker.populated(span, Kind::Mixed)?);
            }
        }
        Ok(written)
    }

    /// Stops tracking.
    pub fn release(&mut self) {
        self.tracker = None;
    }
}
