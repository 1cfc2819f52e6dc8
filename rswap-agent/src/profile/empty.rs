//! A program that does nothing at every switch: the floor of what any profiler of the scheduler costs.

use aya::{Btf, Ebpf, EbpfLoader, programs::tp_btf::BtfTracePointLink};

use super::probes::{NO_OBJECT, OBJECT, attach_program, chain};

/// The program, as long as it is attached.
pub struct EmptyProgram {
    _ebpf: Ebpf,
    _link: BtfTracePointLink,
}

impl std::fmt::Debug for EmptyProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmptyProgram").finish_non_exhaustive()
    }
}

impl EmptyProgram {
    /// Attaches it to `sched_switch`, or says why that can't be.
    pub fn attach() -> Result<Self, String> {
        let object = OBJECT.ok_or(NO_OBJECT)?;
        let btf =
            Btf::from_sys_fs().map_err(|error| format!("read the kernel's type information: {error}"))?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .load(object)
            .map_err(|error| format!("load the eBPF object: {}", chain(&error)))?;
        let link = attach_program(&mut ebpf, "empty_switch", "sched_switch", &btf)?;
        Ok(Self { _ebpf: ebpf, _link: link })
    }
}
