//! A program that has page faults, and times each of them by itself: `faulter MINOR MAJOR FILE`.
//!
//! It says `ready`, and for each line that it reads touches MINOR new pages and MAJOR pages of FILE that it has the kernel forget before, one after the
//! other. Then it says how long each took, in nanoseconds, the minor ones in a line and the major ones in the next, and in a third how many of both the
//! kernel counted for it meanwhile.

use std::{
    env,
    fs::File,
    io::{self, BufRead, Write},
    num::NonZeroUsize,
    ptr::NonNull,
    time::Instant,
};

use anyhow::{Context, ensure};
use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    libc,
    sys::{
        mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
        resource::{UsageWho, getrusage},
    },
};

const PAGE: usize = 4096;

fn main() -> anyhow::Result<()> {
    let mut arguments = env::args().skip(1);
    let mut number = || arguments.next().context("a number")?.parse::<usize>().context("a number");
    let (minor, major) = (number()?, number()?);
    let file = File::open(arguments.next().context("a file")?)?;
    ensure!(file.metadata()?.len() >= (major * PAGE) as u64, "the file has too few pages");
    // Where times are noted there must be no faults.
    let (mut minor_ns, mut major_ns) = (vec![1_u64; minor], vec![1_u64; major]);
    let mut out = io::stdout();
    writeln!(out, "ready")?;
    for line in io::stdin().lock().lines() {
        line?;
        let before = getrusage(UsageWho::RUSAGE_SELF)?;
        touch_new(&mut minor_ns)?;
        touch_forgotten(&file, &mut major_ns)?;
        let after = getrusage(UsageWho::RUSAGE_SELF)?;
        for times in [&minor_ns, &major_ns] {
            let times: Vec<String> = times.iter().map(u64::to_string).collect();
            writeln!(out, "{}", times.join(" "))?;
        }
        let of_kernel = [
            after.minor_page_faults() - before.minor_page_faults(),
            after.major_page_faults() - before.major_page_faults(),
        ];
        writeln!(out, "{} {}", of_kernel[0], of_kernel[1])?;
        out.flush()?;
    }
    Ok(())
}

/// Writes to pages that are not there yet.
fn touch_new(times_ns: &mut [u64]) -> anyhow::Result<()> {
    let length = NonZeroUsize::new(times_ns.len() * PAGE).context("no pages")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: needed because nothing else has pages that are certainly not there; new memory, at an address of the kernel's choice.
    let memory = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
    // SAFETY: of the mapping just made; it changes no contents.
    unsafe { madvise(memory, length.get(), MmapAdvise::MADV_NOHUGEPAGE) }?;
    time_each(times_ns, |page| {
        // SAFETY: inside of the mapping, which may be written.
        unsafe { memory.cast::<u8>().add(page * PAGE).write_volatile(1) }
    });
    // SAFETY: the mapping made above, which nothing refers to any more.
    unsafe { munmap(memory, length.get()) }?;
    Ok(())
}

/// Reads pages that have to be fetched from the disk.
fn touch_forgotten(file: &File, times_ns: &mut [u64]) -> anyhow::Result<()> {
    let Some(length) = NonZeroUsize::new(times_ns.len() * PAGE) else { return Ok(()) };
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    // SAFETY: as in `touch_new`; nobody cuts the file off.
    let memory = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }?;
    // SAFETY: as in `touch_new`.
    unsafe { madvise(memory, length.get(), MmapAdvise::MADV_RANDOM) }?;
    let memory: NonNull<libc::c_void> = memory;
    time_each(times_ns, |page| {
        // SAFETY: inside of the mapping, which may be read.
        let _byte = unsafe { memory.cast::<u8>().add(page * PAGE).read_volatile() };
    });
    // SAFETY: as in `touch_new`.
    unsafe { munmap(memory, length.get()) }?;
    Ok(())
}

fn time_each(times_ns: &mut [u64], touch: impl Fn(usize)) {
    for (page, time_ns) in times_ns.iter_mut().enumerate() {
        let began = Instant::now();
        touch(page);
        *time_ns = began.elapsed().as_nanos() as u64;
    }
}
