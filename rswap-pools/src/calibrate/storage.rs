//! Storage: direct I/O in a file without a name.
//!
//! The file never has a name (`O_TMPFILE`), or loses it before anything is written: whatever ends the benchmark, the kernel frees it.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat, unlinkat},
    io::Errno,
};

use super::{CalibrateError, Result, Stop, failed, next, quantile};

/// How large the file becomes at most.
pub const FILE_BYTES: u64 = 64 << 20;
/// Of what is available.
const SHARE_OF_AVAILABLE: u64 = 20;
const BLOCK_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 256 << 10;
/// How long it is filled at most.
const FILL_FOR: Duration = Duration::from_secs(2);
/// How long each of the other steps takes.
const EACH: Duration = Duration::from_millis(700);
/// Small blocks are written this often at most.
const SMALL_WRITES: u64 = 4096;
/// Reads that are under way at once when IOPS are counted.
const READERS: usize = 8;

/// Aligned as direct I/O asks for.
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

#[repr(C, align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

/// How large the file is where `available_bytes` are; `None` if that is too little.
pub fn storage_bytes(available_bytes: u64) -> Option<u64> {
    let bytes = FILE_BYTES.min(available_bytes / SHARE_OF_AVAILABLE);
    let bytes = bytes - bytes % CHUNK_BYTES as u64;
    (bytes > 0).then_some(bytes)
}

/// Measures the file system that `directory` is on, in a file of at most `bytes` in it.
pub fn storage(
    directory: &Path,
    bytes: u64,
    stop: &Stop,
) -> std::result::Result<Vec<Result>, CalibrateError> {
    let file = nameless(directory)?;
    let (bytes, write_rate) = fill(&file, bytes, stop)?;
    let blocks = bytes / BLOCK_BYTES as u64;
    let mut block = Box::new(Block([0x5a; BLOCK_BYTES]));
    let reads =
        each(stop, u64::MAX, blocks, |at| file.read_exact_at(&mut block.0, at)).map_err(failed("read"));
    let reads = reads?.ok_or(CalibrateError::Stopped)?;
    let writes =
        each(stop, SMALL_WRITES, blocks, |at| file.write_all_at(&block.0, at)).map_err(failed("write"));
    let writes = writes?.ok_or(CalibrateError::Stopped)?;
    let iops = read_iops(&file, blocks, stop)?;
    Ok(vec![
        ("read_latency_p50_us", quantile(&reads, 0.5)),
        ("read_latency_p99_us", quantile(&reads, 0.99)),
        ("read_iops", iops),
        ("write_latency_p50_us", quantile(&writes, 0.5)),
        ("write_latency_p99_us", quantile(&writes, 0.99)),
        ("write_bytes_per_s", write_rate),
    ])
}

fn nameless(directory: &Path) -> std::result::Result<File, CalibrateError> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let opened = match openat(CWD, directory, flags | OFlags::TMPFILE, mode) {
        // Not every file system has files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let path = directory.join(format!(".rswap-calibrate-{}", std::process::id()));
            let made = openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL, mode);
            // Without O_DIRECT the file is made before the call fails.
            if !matches!(made, Err(Errno::EXIST)) {
                let _ = unlinkat(CWD, &path, rustix::fs::AtFlags::empty());
            }
            made
        }
        opened => opened,
    };
    opened.map(File::from).map_err(|errno| match errno {
        Errno::INVAL => CalibrateError::Refused(format!(
            "{} has no direct I/O: what would be measured is the cache",
            directory.display()
        )),
        errno => failed(format!("make a file in {}", directory.display()))(errno.into()),
    })
}

/// Writes the file from its start; answers with its length, and bytes per second.
fn fill(file: &File, bytes: u64, stop: &Stop) -> std::result::Result<(u64, f64), CalibrateError> {
    let mut chunk = Box::new(Chunk([0; CHUNK_BYTES]));
    // What can't be compressed: some devices and file systems do.
    let mut state = 0x9e37_79b9_7f4a_7c15;
    chunk.0.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&next(&mut state).to_le_bytes()));
    let began = Instant::now();
    let mut at = 0;
    while at < bytes && (at == 0 || began.elapsed() < FILL_FOR) {
        stop.check()?;
        // No two chunks are alike, either.
        chunk.0[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&chunk.0, at).map_err(failed("write"))?;
        at += CHUNK_BYTES as u64;
    }
    file.sync_data().map_err(failed("write"))?;
    Ok((at, at as f64 / began.elapsed().as_secs_f64()))
}

/// One access after another at random blocks, sorted, in microseconds; `None` if it was stopped.
fn each(
    stop: &Stop,
    most: u64,
    blocks: u64,
    mut access: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<Option<Vec<f64>>> {
    let began = Instant::now();
    let mut state = 0x2545_f491_4f6c_dd1d;
    let mut times = Vec::new();
    while (times.len() as u64) < most && (times.is_empty() || began.elapsed() < EACH) {
        if stop.check().is_err() {
            return Ok(None);
        }
        let at = (next(&mut state) % blocks) * BLOCK_BYTES as u64;
        let start = Instant::now();
        access(at)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(Some(times))
}

fn read_iops(file: &File, blocks: u64, stop: &Stop) -> std::result::Result<f64, CalibrateError> {
    let done = AtomicU64::new(0);
    let began = Instant::now();
    let (file, count) = (&file, &done);
    let results: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let readers: Vec<_> = (1..=READERS as u64)
            .map(|seed| {
                scope.spawn(move || {
                    let mut block = Box::new(Block([0; BLOCK_BYTES]));
                    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    while began.elapsed() < EACH && stop.check().is_ok() {
                        let at = (next(&mut state) % blocks) * BLOCK_BYTES as u64;
                        file.read_exact_at(&mut block.0, at)?;
                        count.fetch_add(1, Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let panicked = |_| Err(io::Error::other("a reader panicked"));
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(panicked)).collect()
    });
    stop.check()?;
    results.into_iter().collect::<io::Result<()>>().map_err(failed("read"))?;
    Ok(done.load(Relaxed) as f64 / began.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_small_against_what_is_available() {
        assert_eq!(storage_bytes(1 << 40), Some(FILE_BYTES));
        assert_eq!(storage_bytes(100 << 20), Some(5 << 20));
        assert_eq!(storage_bytes(4 << 20), None);
    }

    #[test]
    fn a_directory_is_measured_and_nothing_is_left() {
        // Beside the build, which is on a disk: /tmp may be in memory, which may have no direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let found = storage(dir.path(), 1 << 20, &Stop::default()).unwrap();
        assert!(found.iter().all(|(_, value)| *value > 0.0 && value.is_finite()), "{found:?}");
        let stop = Stop::default();
        stop.set();
        assert!(matches!(storage(dir.path(), 1 << 20, &stop), Err(CalibrateError::Stopped)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let none = storage(Path::new("/nonexistent"), 1 << 20, &Stop::default()).unwrap_err();
        assert!(none.to_string().contains("/nonexistent"), "{none}");
    }
}
