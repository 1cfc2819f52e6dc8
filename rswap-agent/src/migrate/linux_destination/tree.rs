//! The tree of an instance's processes at the destination: who is made by whom, what they have in common, sessions and groups.

use super::{BuiltProcess, LinuxDestination, Reception, TaskError, refuse};
use crate::{
    sys::process::Common,
    tracee::{
        image::InstanceImage,
        layout::{Mapping, ProcessLayout},
        rebuild::Parts,
        space::Space,
        tables::{self, Tables},
        tree::{self, INIT, Node},
    },
};

impl<R: Reception> LinuxDestination<R> {
    /// Makes processes, which come parents first; an orphan waits for the leader of its session.
    pub(super) fn make_all(&mut self, mut left: Vec<&ProcessLayout>) -> Result<(), TaskError> {
        while !left.is_empty() {
            let round = std::mem::take(&mut left);
            for &wanted in &round {
                let node = wanted.node;
                let made = |pid: i32| self.processes.iter().any(|process| process.node.pid == pid);
                let is_to_come = |pid| !made(pid) && round.iter().any(|other| other.node.pid == pid);
                let waits_for_leader = self.has_lost_its_session(node) && is_to_come(node.session);
                match waits_for_leader || is_to_come(node.parent) {
                    true => left.push(wanted),
                    false => self.make(wanted)?,
                }
            }
            if left.len() == round.len() {
                let pids: Vec<i32> = left.iter().map(|wanted| wanted.node.pid).collect();
                return Err(refuse(format!("processes {pids:?} can't be made in any order")));
            }
        }
        Ok(())
    }

    /// Whether it is an orphan in a session that none of those is in who could make it.
    pub(super) fn has_lost_its_session(&self, node: Node) -> bool {
        let siblings = || self.processes.iter().filter(|process| process.node.parent == INIT);
        node.parent == INIT
            && ![0, INIT, node.pid].contains(&node.session)
            && siblings().all(|process| process.node.session != node.session)
    }

    /// Makes an orphan as it became one: the child of a process of its session, which ends. If the session's leader has
    /// ended, that is the one.
    pub(super) fn make_orphan(&mut self, wanted: &ProcessLayout) -> Result<Space, TaskError> {
        let node = wanted.node;
        let mappings = Some(wanted.kernel_mappings.as_slice());
        let inside = self.processes.iter().position(|process| process.node.session == node.session);
        let (mut parent, to_be_read) = match inside {
            Some(at) => {
                let taken = |pid: i32| {
                    let uses = |node: &Node| [node.pid, node.session, node.group].contains(&pid);
                    uses(&node) || self.processes.iter().any(|process| uses(&process.node))
                };
                // It is gone before another one needs the number.
                let free = (node.pid + 1..).find(|pid| !taken(*pid)).unwrap_or(node.pid + 1);
                (self.processes[at].space.make_child(free, false, &[], mappings)?, Some((at, free)))
            }
            None => {
                let leader = Node { pid: node.session, group: node.session, ..node };
                let mut leader = make_beside_or_below(&mut self.processes, leader, None, mappings)?;
                leader.start_session()?;
                (leader, None)
            }
        };
        let orphan = parent.make_child(node.pid, false, &[], mappings)?;
        parent.end_with(0)?;
        if let Some((at, pid)) = to_be_read {
            self.processes[at].space.reap(pid)?;
        }
        Ok(orphan)
    }

    /// Lets processes leave tables that they have no longer in common with others.
    pub(super) fn separate(&mut self) -> Result<(), TaskError> {
        for what in tables::ALL {
            let pids: Vec<i32> = self.processes.iter().map(|process| process.space.pid()).collect();
            let here = tables::first_with(&pids, what)?;
            let wanted: Vec<u32> = self.processes.iter().map(|process| process.tables.of(what)).collect();
            for at in 0..here.len() {
                let mut others = (0..here.len()).filter(|other| *other != at);
                let shares = others.clone().any(|other| here[other] == here[at]);
                if shares && others.all(|other| wanted[other] != wanted[at]) {
                    self.processes[at].space.leave(what)?;
                }
            }
        }
        Ok(())
    }

    /// Has the processes have those tables in common that they had at the source. Returns which parts are to be set with each.
    pub(super) fn settle_tables(&mut self, image: &InstanceImage) -> Result<Vec<Parts>, TaskError> {
        for process in &mut self.processes {
            let described = image.processes.iter().find(|described| described.space == process.number);
            process.tables = described.map_or(process.tables, |described| described.tables);
        }
        self.separate()?;
        let mut pids = Vec::with_capacity(image.processes.len());
        for described in &image.processes {
            pids.push(self.space(described.space)?.pid());
        }
        let spaces: Vec<u32> = image.processes.iter().map(|described| described.space).collect();
        let here = tables::of_processes(&pids, &spaces)?;
        if image.processes.iter().map(|described| described.tables).ne(here.iter().copied()) {
            let text = "processes have other descriptors or directories in common than when they were made: try again";
            return Err(refuse(text.into()));
        }
        let parts = image.processes.iter().enumerate().map(|(at, process)| Parts {
            descriptors: process.tables.descriptors == process.space,
            directories: image.processes[at + 1..]
                .iter()
                .all(|other| other.tables.directories != process.tables.directories),
        });
        Ok(parts.collect())
    }

    /// Makes a process for each group whose leader has ended: nobody could join the group without one. Returns the group, the
    /// position of the process's parent, and the process, which is to be ended when all have joined.
    fn lead_groups(
        &mut self,
        zombies: impl Iterator<Item = Node>,
    ) -> Result<Vec<(i32, usize, Space)>, TaskError> {
        let nodes: Vec<Node> = self.processes.iter().map(|process| process.node).chain(zombies).collect();
        let mut leaders = Vec::new();
        for (group, session) in tree::groups_without_leader(&nodes) {
            // Its session's leader may have been made for a moment, and have led it.
            let pids = self.processes.iter().map(|process| process.space.pid());
            if pids.map(tree::group).collect::<Result<Vec<_>, _>>()?.contains(&group) {
                continue;
            }
            let parent = self.processes.iter().position(|process| process.node.session == session);
            let parent =
                parent.ok_or_else(|| refuse(format!("process group {group} has lost its session")))?;
            let mut leader = self.processes[parent].space.make_child(group, false, &[], None)?;
            leader.join_group(group)?;
            leaders.push((group, parent, leader));
        }
        Ok(leaders)
    }

    /// Makes the zombies, and puts every process into its group.
    pub(super) fn finish_tree(&mut self, image: &InstanceImage) -> Result<(), TaskError> {
        let mut zombies = Vec::new();
        for &node in &image.zombies {
            let mut space = make_beside_or_below(&mut self.processes, node, None, None)?;
            if node.session == node.pid {
                space.start_session()?;
            }
            zombies.push(BuiltProcess { number: u32::MAX, node, tables: Tables::default(), space });
        }
        for process in &self.processes {
            let wanted = process.node.session;
            if wanted != 0 && tree::session(process.space.pid())? != wanted {
                let text = format!("process {} can't be put into session {wanted}", process.node.pid);
                return Err(refuse(text));
            }
        }
        let leaders = self.lead_groups(zombies.iter().map(|zombie| zombie.node))?;
        // Leaders first: nobody can join a group that isn't there. Leaders of sessions lead their group already.
        let leads = |node: &Node| node.group == node.pid;
        for leaders in [true, false] {
            for process in self.processes.iter_mut().chain(&mut zombies) {
                let node = process.node;
                if node.group != 0 && node.session != node.pid && leads(&node) == leaders {
                    process.space.join_group(node.group)?;
                }
            }
        }
        for (group, parent, leader) in leaders {
            leader.end_with(0)?;
            self.processes[parent].space.reap(group)?;
        }
        for zombie in zombies {
            zombie.space.end_with(zombie.node.status.unwrap_or(0))?;
        }
        self.stop_those_stopped(image)?;
        for process in &mut self.processes {
            process.space.drop_signals()?;
        }
        Ok(())
    }

    /// Stops the programs that were stopped, for their parents to find if they had not yet.
    fn stop_those_stopped(&mut self, image: &InstanceImage) -> Result<(), TaskError> {
        for described in &image.processes {
            let Some(stop) = described.task.stopped else { continue };
            self.space(described.space)?.stop_by(stop.signal)?;
            let parent = self.processes.iter_mut().find(|p| p.node.pid == described.node.parent);
            if let Some(parent) = parent.filter(|_| !stop.unread) {
                parent.space.read_stop(described.node.pid)?;
            }
        }
        Ok(())
    }
}

/// Makes the process of `node`: a child of its parent's stub, or a sibling of another one, by whoever has the tables in common
/// with it that it is to have.
pub(super) fn make_beside_or_below(
    processes: &mut [BuiltProcess],
    node: Node,
    tables: Option<Tables>,
    kernel_mappings: Option<&[Mapping]>,
) -> Result<Space, TaskError> {
    let shares = |process: &BuiltProcess, what| {
        tables.is_some_and(|wanted| process.tables.of(what) == wanted.of(what))
    };
    let there = tables::ALL.map(|what| processes.iter().any(|process| shares(process, what)));
    let may_make = |process: &BuiltProcess| {
        let gives = |(what, there): (Common, bool)| shares(process, what) || !there;
        (process.node.pid == node.parent || process.node.parent == node.parent)
            && tables::ALL.into_iter().zip(there).all(gives)
    };
    // The parent before its other children, and those before others that are in the same session.
    let parent = processes.iter().position(|process| process.node.pid == node.parent && may_make(process));
    let beside =
        || processes.iter().position(|process| may_make(process) && process.node.session == node.session);
    let by = parent.or_else(beside).or_else(|| processes.iter().position(may_make));
    let by = by.ok_or_else(|| {
        let (pid, parent) = (node.pid, node.parent);
        refuse(format!(
            "neither process {parent}, its parent, nor another child of that can make process {pid}"
        ))
    })?;
    let by = &mut processes[by];
    let in_common: Vec<Common> = tables::ALL.into_iter().filter(|what| shares(by, *what)).collect();
    let beside = by.node.pid != node.parent;
    Ok(by.space.make_child(node.pid, beside, &in_common, kernel_mappings)?)
}
