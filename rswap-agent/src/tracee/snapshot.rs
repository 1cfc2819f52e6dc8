//! Takes the image of an instance whose processes are stopped.

use std::{collections::BTreeMap, path::Path};

use super::{
    TraceeError,
    advice::Advice,
    attributes::{self, InstanceProcessors},
    capture::{Status, capture},
    cgroups::Subtree,
    crew::{Crew, Hand},
    descriptors::{self, Around, Refused},
    files::{self, Places},
    image::{Descriptor, InstanceImage, ProcessImage, TaskImage},
    layout::Mapping,
    names::HostNames,
    remote::Remote,
    stopped::StoppedProcess,
    sysv,
    tables::{self, Tables},
    terminals,
    tree::{self, Member, Node},
};
use crate::{
    instance::{
        affinity::{Choices, Processors},
        network::settings::Sysctls,
    },
    sys::process::Common,
};

/// A living process of a frozen instance.
#[derive(Debug)]
pub struct Frozen {
    /// Its number as an address space.
    pub space: u32,
    /// Its pids and its place in the tree.
    pub member: Member,
    /// Its threads, held still,
    pub threads: StoppedProcess,
    /// by this one of ours.
    pub hand: Hand,
    /// Its mappings, without the kernel's own.
    pub mappings: Vec<Mapping>,
    /// The kernel's own.
    pub kernel_mappings: Vec<Mapping>,
    /// What is asked of its memory, not completed yet.
    pub advice: Advice,
}

/// Takes the image of an instance whose processes are all in `frozen`, parents first and held by `crew`, and in `cgroup` or
/// below. What can't be carried is refused. Gives the processes back.
pub fn capture_instance(
    crew: &mut Crew,
    cgroup: &Path,
    frozen: Vec<Frozen>,
    zombies: Vec<Node>,
    places: &Places,
    chosen: Option<(Choices, Processors)>,
) -> (Vec<Frozen>, Result<InstanceImage, TraceeError>) {
    // The init, which the main process comes from, has the processors that the instance may use.
    let init = frozen.first().map_or(Ok(0), |main| tree::parent(main.member.pid));
    let (init, usual) = match init.and_then(|init| Ok((init, attributes::processors(init)?))) {
        Ok(found) => found,
        Err(error) => return (frozen, Err(error)),
    };
    let members: Vec<Member> = frozen.iter().map(|process| process.member).collect();
    let spaces: Vec<u32> = frozen.iter().map(|process| process.space).collect();
    let items = frozen.into_iter().map(|process| (process.hand, process)).collect();
    let home = InstanceProcessors { usual, chosen };
    let tasks = crew.begin(items, move |process| capture(process, &home));
    // Descriptors need no ptrace: they are looked at here meanwhile.
    let described = Described::of(&members, &spaces, places);
    let (frozen, tasks) = crew.finish(tasks);
    let processes = described.and_then(|described| described.join(&frozen, tasks));
    let (frozen, processes) = match processes {
        Ok(processes) if processes.iter().any(|process| process.task.stopped.is_some()) => {
            find_unread_stops(crew, frozen, processes)
        }
        processes => (frozen, processes),
    };
    let image = processes.and_then(|processes| {
        let names = HostNames::of(init).map_err(TraceeError::call("reading the host names", init))?;
        let queues = sysv::queues(init).map_err(TraceeError::call("reading SysV objects", init))?;
        let cgroups =
            Subtree::read(cgroup, init, &members).map_err(TraceeError::call("reading the cgroups", init))?;
        // Sysctls are looked for meanwhile by who has the network namespace.
        Ok(InstanceImage { processes, zombies, names, sysctls: Sysctls::default(), cgroups, queues })
    });
    (frozen, image)
}

/// What of an instance is seen from outside of its processes.
struct Described {
    tables: Vec<Tables>,
    /// The pseudo-terminal that controls each process.
    terminals: Vec<Option<u32>>,
    /// By the process or thread that has them.
    open: BTreeMap<i32, Vec<Descriptor>>,
}

impl Described {
    fn of(members: &[Member], spaces: &[u32], places: &Places) -> Result<Self, TraceeError> {
        if let Some((pid, what)) = tables::obstacles(members)?.first() {
            return Err(TraceeError::Unsupported(format!("process {pid}: {what}: {}", tables::REMEDY)));
        }
        let pids: Vec<i32> = members.iter().map(|member| member.pid).collect();
        let tables = tables::of_processes(&pids, spaces)?;
        let around = Around::of(&pids);
        let mut open = Vec::new();
        for ((member, space), tables) in members.iter().zip(spaces).zip(&tables) {
            // What it has in common with another one comes with that.
            let further = usize::from(tables.descriptors != *space);
            for task in tables::holders(member.pid, Common::Descriptors)?.into_iter().skip(further) {
                let (descriptors, refused) = descriptors::describe(task, &around, true)?;
                refused.first().map_or(Ok(()), |refused| refuse(task, refused))?;
                let inner = match task == member.pid {
                    true => member.node.pid,
                    false => Status::read(task)?.last_number("NSpid:").unwrap_or(task),
                };
                open.push((task, inner, descriptors));
            }
        }
        let lists: Vec<_> = open.iter().map(|(pid, _, list)| (*pid, list.as_slice())).collect();
        descriptors::connected_outside(&lists, true)
            .first()
            .map_or(Ok(()), |(pid, refused)| refuse(*pid, refused))?;
        files::left_behind(&lists, places).first().map_or(Ok(()), |(pid, refused)| refuse(*pid, refused))?;
        let logs = files::logs(&lists, places);
        for (pid, _, descriptors) in &mut open {
            files::note(*pid, descriptors, &logs, places)?;
        }
        descriptors::share(&around, &mut open)?;
        let terminals = members.iter().map(|member| match member.node.session {
            // That of a session outside of the instance stays behind.
            0 => Ok(None),
            _ => terminals::controlling(member.pid),
        });
        let terminals = terminals.collect::<Result<_, _>>()?;
        let open = open.into_iter().map(|(task, _, descriptors)| (task, descriptors)).collect();
        Ok(Self { tables, terminals, open })
    }

    /// Puts it together with what was seen from inside.
    fn join(
        mut self,
        frozen: &[Frozen],
        tasks: Vec<Result<TaskImage, TraceeError>>,
    ) -> Result<Vec<ProcessImage>, TraceeError> {
        let outside = self.tables.into_iter().zip(self.terminals);
        let mut processes = Vec::with_capacity(frozen.len());
        for ((process, task), (tables, terminal)) in frozen.iter().zip(tasks).zip(outside) {
            let mut task = task?;
            let tids = process.threads.tids();
            for (thread, descriptors) in task.open_files_mut() {
                *descriptors = self.open.remove(&tids[thread]).unwrap_or_default();
            }
            let (space, node) = (process.space, process.member.node);
            processes.push(ProcessImage { space, node, terminal, tables, task });
        }
        Ok(processes)
    }
}

/// Notes which of the processes that are stopped by a signal have a parent that was not told of it yet.
fn find_unread_stops(
    crew: &mut Crew,
    frozen: Vec<Frozen>,
    mut processes: Vec<ProcessImage>,
) -> (Vec<Frozen>, Result<Vec<ProcessImage>, TraceeError>) {
    let stopped: Vec<Node> =
        processes.iter().filter(|process| process.task.stopped.is_some()).map(|p| p.node).collect();
    let of = move |parent: &mut Frozen| {
        let children = stopped.iter().filter(|node| node.parent == parent.member.node.pid);
        let unread = children.map(|node| Ok((node.pid, has_unread_stop(&parent.threads, node.pid)?)));
        unread.collect::<Result<Vec<_>, TraceeError>>()
    };
    let items = frozen.into_iter().map(|process| (process.hand, process)).collect();
    let (frozen, found) = crew.each(items, of);
    let found = found.into_iter().collect::<Result<Vec<_>, _>>().map(|found| {
        let found: BTreeMap<i32, bool> = found.into_iter().flatten().collect();
        for process in &mut processes {
            if let Some(stop) = &mut process.task.stopped {
                stop.unread = found.get(&process.node.pid).copied().unwrap_or_default();
            }
        }
        processes
    });
    (frozen, found)
}

/// Whether `parent` would still be told that its child `inner` is stopped.
fn has_unread_stop(parent: &StoppedProcess, inner: i32) -> Result<bool, TraceeError> {
    let mut parent = Remote::of_program(parent)?;
    parent.map_scratch_in_program()?;
    let at = parent.put(0, &[0; 128])?;
    let options = (libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL) as u64;
    parent.call("waitid", libc::SYS_waitid, [libc::P_PID as u64, inner as u64, at, options, 0, 0])?;
    Ok(parent.get::<4>(0)? != [0; 4])
}

fn refuse(pid: i32, refused: &Refused) -> Result<(), TraceeError> {
    let text = format!("descriptor {} of process {pid}: {}: {}", refused.fd, refused.what, refused.remedy);
    Err(TraceeError::Unsupported(text))
}
