//! Moving the cold pages of an instance to swap, and back into memory, while it runs.
//!
//! Nothing is stopped, and nothing can be lost: pages in swap are the kernel's, and whoever uses one has it back.
//!
//! ```text
//! snapshot (may it go there?) -> transfer (probe, wait until pages are old enough, page out) -> verify -> the registry names the pool
//!                                             |
//!            ages: which pages are cold       '- pressure: how many may go
//! ```

pub mod ages;
mod error;
mod held;
mod pages;
mod pressure;
mod wish;

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rswap_pools::{Root, SwapArea, swap_areas};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use error::MemoryError;
pub use held::{Held, Looked};
pub use pressure::Pressure;
pub use wish::{Lately, Wish, wish};

use crate::{config::MemoryConfig, instance::Instance, units::UnixMillis};

/// How long the swap of a person waits for pages to become cold at most; what is cold later, goes later.
const TRANSFER_LIMIT: Duration = Duration::from_secs(100);
/// How long a stop of the agent goes unnoticed.
const SHORT: Duration = Duration::from_millis(100);
/// Of a swap area so much is left to others.
const LEFT_SHARE: f64 = 0.02;
/// What must be available besides what comes back into memory.
const MEMORY_LEFT_BYTES: u64 = 64 << 20;
/// How often what is still in swap is asked for again.
const BACK_PASSES: u32 = 5;

/// What a swap of memory did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Of what can be in swap, what is there now, in bytes.
    pub swapped_bytes: u64,
    /// Of the same, what is in memory, in bytes.
    pub present_bytes: u64,
    /// What was paged out, or brought back, in bytes.
    pub moved_bytes: u64,
    /// What was paged out and used again before the swap's end, in bytes.
    pub returned_bytes: u64,
    /// Not all of it has been judged: the agent goes on with that.
    pub unsettled: bool,
    /// Time in which pages were being moved, in milliseconds. The rest is waiting for pages to become cold.
    pub moving_ms: f64,
    /// How long all of it took, in milliseconds.
    pub duration_ms: f64,
}

/// A swap area that pages may go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The device or file.
    pub path: PathBuf,
    /// How much of it may be used, by anybody, in bytes. Nothing: all of it.
    pub limit_bytes: Option<u64>,
}

/// Where an instance's pages are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// What is cold, in swap.
    Swap(Area),
    /// All, in memory.
    Memory {
        /// How many memory nodes the host has.
        nodes: usize,
        /// It is on a swap pool: that nothing of it has gone there yet is no mistake.
        is_in_swap_pool: bool,
    },
}

/// How an instance on a swap pool fares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InSwap {
    /// The pool.
    pub pool: String,
    /// What the agent does: `out`, `hold` or `back`.
    pub doing: String,
    /// Why, if it is not `out`.
    pub reason: Option<String>,
    /// In swap, in bytes.
    pub swapped_bytes: u64,
    /// In memory, of what could be in swap, in bytes.
    pub present_bytes: u64,
    /// Paged out since the agent looks, in bytes.
    pub out_bytes: u64,
    /// Used, and therefore back, since the agent looks, in bytes.
    pub returned_bytes: u64,
    /// How long it waited between the last two looks.
    #[serde(flatten)]
    pub pressure: Pressure,
}

/// Moves what is cold of an instance to a swap area. The answer has what has been learnt of its pages, too.
///
/// # Errors
/// It may not, or could not, or the agent is `stopping`; what had gone is in memory again, unless the error says so.
pub fn move_out(
    instance: &Instance,
    area: &Area,
    config: &MemoryConfig,
    stopping: &AtomicBool,
) -> Result<(MemoryReport, Held), MemoryError> {
    let began = Instant::now();
    // Snapshot: nothing is changed.
    some_room_in(area, 0)?;
    let mut held = Held::new(instance, config);
    // Transfer.
    let mut report = MemoryReport::default();
    let transferred = transfer(&mut held, area, config, stopping, &mut report);
    // Verify: the area must still be the one that is used, and say how much is there.
    let verified = transferred.and_then(|()| {
        room_in(area)?;
        report.swapped_bytes = held.in_swap()?;
        Ok(())
    });
    if let Err(cause) = verified {
        return Err(restored(&mut held, cause));
    }
    // Activate and deactivate: the registry names the pool; the memory was given back page by page.
    report.duration_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok((report, held))
}

fn transfer(
    held: &mut Held,
    area: &Area,
    config: &MemoryConfig,
    stopping: &AtomicBool,
    report: &mut MemoryReport,
) -> Result<(), MemoryError> {
    let began = Instant::now();
    loop {
        let room = room_in(area)?;
        let looked = held.look(UnixMillis::now(), room)?;
        report.present_bytes = looked.present_bytes;
        report.moved_bytes += looked.out_bytes;
        report.returned_bytes += looked.returned_bytes;
        report.moving_ms += looked.took.as_secs_f64() * 1e3;
        report.unsettled = !looked.settled;
        if looked.settled || began.elapsed() > TRANSFER_LIMIT {
            return Ok(());
        }
        some_room_in(area, looked.swapped_bytes)?;
        let due = Instant::now() + pause(config, looked.took);
        while Instant::now() < due {
            if stopping.load(Ordering::Acquire) {
                return Err(MemoryError::Stopping);
            }
            std::thread::sleep(SHORT.min(due.saturating_duration_since(Instant::now())));
        }
    }
}

/// How long to wait between two looks, so that they take no more than their share of a core.
pub fn pause(config: &MemoryConfig, took: Duration) -> Duration {
    let every = Duration::from_millis(config.look_every_ms);
    let share = config.cpu_share.max(1e-3);
    every.saturating_sub(took).max(took.mul_f64((1.0 - share) / share))
}

/// Brings everything back after a failure.
fn restored(held: &mut Held, cause: MemoryError) -> MemoryError {
    match bring_all_back(held) {
        Ok(_) => cause,
        Err(source) => MemoryError::NotRestored { cause: Box::new(cause), source: Box::new(source) },
    }
}

/// Brings the pages of an instance back from swap into memory.
///
/// # Errors
/// It may not, or could not; what is still in swap comes back when it is used.
pub fn move_back(
    instance: &Instance,
    config: &MemoryConfig,
    nodes: usize,
    is_in_swap_pool: bool,
) -> Result<MemoryReport, MemoryError> {
    let began = Instant::now();
    // Snapshot.
    let mut held = Held::new(instance, config);
    let in_swap = held.in_swap()?;
    if !is_in_swap_pool && in_swap == 0 {
        return Err(MemoryError::NothingToMove { nodes });
    }
    // Transfer, and verify after each pass.
    let moved_bytes = bring_all_back(&mut held)?;
    let duration_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok(MemoryReport { moved_bytes, moving_ms: duration_ms, duration_ms, ..MemoryReport::default() })
}

fn bring_all_back(held: &mut Held) -> Result<u64, MemoryError> {
    let mut moved = 0;
    let mut left = held.in_swap()?;
    for _ in 0..BACK_PASSES {
        if left == 0 {
            return Ok(moved);
        }
        room_for(left)?;
        moved += held.bring_back(u64::MAX)?;
        left = held.in_swap()?;
    }
    match left {
        0 => Ok(moved),
        left => Err(MemoryError::Left { left_kib: left >> 10 }),
    }
}

/// Whether so many bytes can be brought back now.
pub fn room_for(bytes: u64) -> Result<(), MemoryError> {
    const MEMINFO: &str = "/proc/meminfo";
    let text = fs::read_to_string(MEMINFO).unwrap_or_default();
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).ok_or(MemoryError::Unknown(MEMINFO))?;
    fits(bytes, kib << 10)
}

fn fits(bytes: u64, available: u64) -> Result<(), MemoryError> {
    if bytes.saturating_add(MEMORY_LEFT_BYTES) <= available {
        return Ok(());
    }
    Err(MemoryError::NoMemory {
        needed_mib: bytes >> 20,
        available_mib: available >> 20,
        kept_mib: MEMORY_LEFT_BYTES >> 20,
    })
}

/// How many bytes may be paged out to an area.
///
/// # Errors
/// It is not there, or pages would go elsewhere.
pub fn room_in(area: &Area) -> Result<u64, MemoryError> {
    room_among(&swap_areas(&Root::machine()), area)
}

/// Refuses an area in which nothing has room any more.
fn some_room_in(area: &Area, swapped_bytes: u64) -> Result<(), MemoryError> {
    let room = room_in(area)?;
    if room >= ages::REGION_BYTES {
        return Ok(());
    }
    let (out_mib, room_kib) = (swapped_bytes >> 20, room >> 10);
    Err(MemoryError::NoRoom { path: area.path.clone(), out_mib, room_kib })
}

fn room_among(areas: &[SwapArea], wanted: &Area) -> Result<u64, MemoryError> {
    let path = &wanted.path;
    let area = areas.iter().find(|area| area.path == *path);
    let area = area.ok_or_else(|| MemoryError::NoArea { path: path.clone() })?;
    let first = areas.iter().find(|other| {
        other.path != *path && other.priority >= area.priority && other.free_bytes() >= ages::REGION_BYTES
    });
    if let Some(other) = first {
        let (other, priority) = (other.path.clone(), other.priority);
        return Err(MemoryError::AnotherFirst { path: path.clone(), other, priority });
    }
    let free = area.free_bytes().saturating_sub((area.bytes as f64 * LEFT_SHARE) as u64);
    let allowed = wanted.limit_bytes.map_or(u64::MAX, |limit| limit.saturating_sub(area.used_bytes));
    Ok(free.min(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(path: &str, used_bytes: u64, priority: i32) -> SwapArea {
        SwapArea { path: path.into(), file: false, bytes: 100 << 20, used_bytes, priority }
    }

    #[test]
    fn pages_go_where_the_kernel_puts_them_or_not_at_all() {
        let wanted = Area { path: "/dev/zram0".into(), limit_bytes: None };
        let room = |areas: &[SwapArea]| room_among(areas, &wanted);
        let zram = area("/dev/zram0", 8 << 20, 5);
        assert_eq!(room(std::slice::from_ref(&zram)).unwrap(), 90 << 20);
        assert_eq!(room(&[area("/swap", 0, 4), zram.clone()]).unwrap(), 90 << 20);
        for priority in [5, 6] {
            let error = room(&[zram.clone(), area("/swap", 0, priority)]).unwrap_err().to_string();
            assert!(error.contains("pages would go to /swap"), "{error}");
        }
        // A full one is passed over by the kernel.
        assert_eq!(room(&[area("/swap", 100 << 20, 6), zram]).unwrap(), 90 << 20);
        let error = room(&[area("/swap", 0, 4)]).unwrap_err().to_string();
        assert!(error.contains("/dev/zram0 is not in /proc/swaps"), "{error}");
        let nearly_full = [area("/dev/zram0", 99 << 20, 5)];
        assert_eq!(room(&nearly_full).unwrap(), 0);
        let limited = Area { limit_bytes: Some(20 << 20), ..wanted.clone() };
        assert_eq!(room_among(&[area("/dev/zram0", 8 << 20, 5)], &limited).unwrap(), 12 << 20);
        assert_eq!(room_among(&nearly_full, &limited).unwrap(), 0);
    }

    #[test]
    fn what_does_not_fit_into_memory_is_refused_with_the_figures() {
        assert!(fits(100 << 20, 164 << 20).is_ok());
        let error = fits(100 << 20, 163 << 20).unwrap_err().to_string();
        assert!(
            error.starts_with("100 MiB of it are in swap, and 163 MiB of memory are available"),
            "{error}"
        );
    }

    #[test]
    fn looks_take_no_more_than_their_share() {
        let config = MemoryConfig { look_every_ms: 1000, cpu_share: 0.02, ..MemoryConfig::default() };
        let ms = Duration::from_millis;
        assert_eq!(pause(&config, ms(10)), ms(990));
        assert_eq!(pause(&config, ms(40)), ms(1960));
    }
}
