//! What the eBPF programs of another process cost, by the kernel's own statistics. Only the benchmark asks.

use std::{collections::BTreeSet, fs, os::fd::OwnedFd};

use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};

use super::{ProgramCost, probes::chain};

/// The kernel measures all eBPF programs, whosever they are, as long as this is there.
#[derive(Debug)]
pub struct ForeignPrograms {
    _statistics: OwnedFd,
}

impl ForeignPrograms {
    /// Has them measured, or says why that can't be.
    pub fn measure() -> Result<Self, String> {
        let statistics = enable_stats(Stats::RunTime).map_err(|error| chain(&error))?;
        Ok(Self { _statistics: statistics })
    }

    /// What each program of a process has cost so far, by the program's name.
    pub fn costs(&self, pid: u32) -> Vec<ProgramCost> {
        let ids = program_ids(pid);
        // What was unloaded meanwhile can't be asked any more.
        let programs = loaded_programs().filter_map(Result::ok).filter(|program| ids.contains(&program.id()));
        let cost = |program: aya::programs::ProgramInfo| {
            let (runs, ran_ns) = (program.run_count(), program.run_time().as_nanos() as f64);
            let ns_per_run = if runs == 0 { 0.0 } else { ran_ns / runs as f64 };
            ProgramCost {
                name: program.name_as_str().unwrap_or("?").to_owned(),
                runs,
                ns_per_run,
                core_share: None,
                missed: None,
            }
        };
        programs.map(cost).collect()
    }
}

/// The programs that a process holds, as the kernel numbers them; of one that has ended, none.
pub fn program_ids(pid: u32) -> BTreeSet<u32> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = descriptors.filter_map(|descriptor| fs::read_to_string(descriptor.path()).ok());
    texts.filter_map(|text| program_id(&text)).collect()
}

/// Of the description of a program, or of what attaches one.
fn program_id(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_says_which_program_it_is_of() {
        let program = "pos:\t0\nflags:\t02000002\nprog_type:\t5\nprog_jited:\t1\nmemlock:\t4096\nprog_id:\t4711\nrun_time_ns:\t0\n";
        assert_eq!(program_id(program), Some(4711));
        assert_eq!(program_id("pos:\t0\nmap_type:\t2\nmap_id:\t12\n"), None);
        assert_eq!(program_id("prog_id:\t\n"), None);
    }
}
