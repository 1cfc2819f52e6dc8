//! Programs that do nothing: the floor of what any profiler costs that sits on these tracepoints.

use std::os::fd::OwnedFd;

use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::tp_btf::BtfTracePointLink,
    sys::{Stats, enable_stats},
};

use super::probes::{NO_OBJECT, OBJECT, attach_program, chain};

/// A program, and its tracepoint.
type Named = (&'static str, &'static str);

const SWITCH: Named = ("empty_switch", "sched_switch");

/// Programs that do nothing, as long as they are attached.
pub struct EmptyProgram {
    ebpf: Ebpf,
    names: &'static [Named],
    _links: Vec<BtfTracePointLink>,
    _statistics: Option<OwnedFd>,
}

impl std::fmt::Debug for EmptyProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmptyProgram").field("names", &self.names).finish_non_exhaustive()
    }
}

impl EmptyProgram {
    /// Attaches one to `sched_switch`, or says why that can't be.
    pub fn attach() -> Result<Self, String> {
        Self::attach_all(&[SWITCH], None)
    }

    /// Attaches one to each tracepoint that is passed at a switch or a wake-up where waits are measured exactly.
    pub fn attach_exact() -> Result<Self, String> {
        Self::attach_all(&[SWITCH, ("empty_waking", "sched_waking")], None)
    }

    /// Attaches one to each tracepoint of block I/O that is profiled, and has the kernel measure them.
    pub fn attach_block() -> Result<Self, String> {
        let statistics = enable_stats(Stats::RunTime).map_err(|error| chain(&error))?;
        let names = &[("empty_io_start", "block_io_start"), ("empty_rq_complete", "block_rq_complete")];
        Self::attach_all(names, Some(statistics))
    }

    fn attach_all(names: &'static [Named], statistics: Option<OwnedFd>) -> Result<Self, String> {
        let object = OBJECT.ok_or(NO_OBJECT)?;
        let btf =
            Btf::from_sys_fs().map_err(|error| format!("read the kernel's type information: {error}"))?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .load(object)
            .map_err(|error| format!("load the eBPF object: {}", chain(&error)))?;
        let links = names.iter().map(|(name, tracepoint)| attach_program(&mut ebpf, name, tracepoint, &btf));
        let links = links.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { ebpf, names, _links: links, _statistics: statistics })
    }

    /// What one run of each takes in nanoseconds, all together: the kernel's calling it, and measuring it.
    pub fn ns_per_run(&self) -> f64 {
        let programs = self.names.iter().filter_map(|(name, _)| self.ebpf.program(name)?.info().ok());
        programs.map(|info| info.run_time().as_nanos() as f64 / info.run_count().max(1) as f64).sum()
    }
}
