//! What a process has cost so far, by /proc.

use std::{fs, time::Duration};

use anyhow::Context;

/// CPU time of a process and all of its threads.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // After the name, which may have anything in it: proc_pid_stat(5), fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|&field| fields.get(field)?.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// A line of `/proc/PID/status` such as `VmRSS:`, in KiB.
///
/// # Errors
/// There is no such process, or no such line.
pub fn status_kib(pid: u32, key: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    value.with_context(|| format!("{path} has no {key}"))
}
