//! A Linux process that is being built as the destination of a migration.

use std::time::Instant;

use super::{
    linux_source::{HostTraits, Requirements, file_digest},
    traits::{DestinationTask, PAGE_SIZE, PageRange, TaskError},
};
use crate::{
    instance::{Instance, Origin, arrival::Arrival},
    tracee::{
        TraceeError,
        image::TaskImage,
        layout::Layout,
        rebuild::{self, Rebuilt},
        space::Space,
    },
    units::UnixMillis,
};

/// Where arriving instances are put; given by the wiring.
pub trait Reception {
    /// Makes the cgroup, the namespaces with their init, and a stub with pid `inner_pid` waiting in them.
    fn receive(&mut self, instance: &Instance, inner_pid: i32) -> Result<Arrival, TaskError>;
}

/// The instance under construction, as the engine sees it.
pub struct LinuxDestination<R> {
    reception: R,
    arrival: Option<Arrival>,
    space: Option<Space>,
    rebuilt: Option<Rebuilt>,
    instance: Option<Instance>,
}

impl<R: Reception> LinuxDestination<R> {
    /// Waits for an offer.
    pub fn new(reception: R) -> Self {
        Self { reception, arrival: None, space: None, rebuilt: None, instance: None }
    }

    /// The instance, once it runs here.
    pub fn into_instance(self) -> Option<Instance> {
        self.instance
    }

    fn space(&mut self) -> Result<&mut Space, TaskError> {
        self.space.as_mut().ok_or_else(|| "nothing has been prepared".into())
    }
}

fn refuse(text: String) -> TaskError {
    TraceeError::Unsupported(text).into()
}

/// Compares what must be the same on both hosts.
fn compare(requirements: &Requirements) -> Result<(), TaskError> {
    let (here, there) = (HostTraits::here()?, &requirements.host);
    if here.kernel != there.kernel {
        let text = format!("this host runs kernel {} and the source {}", here.kernel, there.kernel);
        return Err(refuse(format!("{text}: use the same kernel build on both")));
    }
    let lacking: Vec<&String> =
        there.cpu_features.iter().filter(|f| !here.cpu_features.contains(f)).collect();
    if !lacking.is_empty() {
        return Err(refuse(format!("this host's processor lacks {lacking:?}, which the program may use")));
    }
    if here.boot_id != there.boot_id {
        let text = "CLOCK_MONOTONIC would jump: moving between separately booted kernels needs a time \
                    namespace, which this version doesn't make";
        return Err(refuse(text.into()));
    }
    for (path, digest) in &requirements.files {
        match file_digest(path) {
            Ok(here) if here == *digest => {}
            Ok(_) => return Err(refuse(format!("{path} differs: install the same version on both hosts"))),
            Err(error) => return Err(refuse(format!("{path} can't be read on this host: {error}"))),
        }
    }
    let available = available_memory_bytes()?;
    if requirements.resident_bytes > available {
        let wanted = requirements.resident_bytes;
        return Err(refuse(format!("no room: {wanted} bytes are needed, {available} are available")));
    }
    Ok(())
}

fn available_memory_bytes() -> Result<u64, TaskError> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    Ok(line.split_whitespace().next().unwrap_or("0").parse::<u64>()? * 1024)
}

impl<R: Reception> DestinationTask for LinuxDestination<R> {
    fn prepare(&mut self, requirements: &[u8]) -> Result<(), TaskError> {
        let requirements: Requirements = postcard::from_bytes(requirements)?;
        compare(&requirements)?;
        let arrival = self.reception.receive(&requirements.instance, requirements.inner_pid)?;
        let stub = arrival.stub_pid;
        self.arrival = Some(arrival);
        self.space = Some(Space::take(stub, &requirements.kernel_mappings)?);
        Ok(())
    }

    fn apply_layout(&mut self, layout: &[u8]) -> Result<(), TaskError> {
        let layout: Layout = postcard::from_bytes(layout)?;
        Ok(self.space()?.apply(&layout)?)
    }

    fn write(&mut self, _space: u32, addr: u64, data: &[u8]) -> Result<(), TaskError> {
        Ok(self.space()?.write(addr, data)?)
    }

    fn discard(&mut self, range: &PageRange) -> Result<(), TaskError> {
        let end = range.start + range.pages * PAGE_SIZE as u64;
        Ok(self.space()?.discard(range.start, end)?)
    }

    fn read(&mut self, _space: u32, addr: u64, buf: &mut [u8]) -> Result<(), TaskError> {
        Ok(self.space()?.read(addr, buf)?)
    }

    fn restore(&mut self, image: &[u8]) -> Result<(), TaskError> {
        let image: TaskImage = postcard::from_bytes(image)?;
        let rebuilt = rebuild::rebuild(self.space()?, &image)?;
        self.rebuilt = Some(rebuilt);
        Ok(())
    }

    fn activate(&mut self) -> Result<(), TaskError> {
        let rebuilt = self.rebuilt.take().ok_or("nothing was restored")?;
        let arrival = self.arrival.as_mut().ok_or("nothing has been prepared")?;
        let began = Instant::now();
        arrival.attach()?;
        let attached = began.elapsed();
        rebuilt.release()?;
        tracing::debug!(?attached, released = ?began.elapsed(), "activated");
        let mut instance = arrival.instance.clone();
        instance.origin = Origin::Migrated;
        instance.since = UnixMillis::now();
        arrival.keep(&instance)?;
        self.instance = Some(instance);
        Ok(())
    }

    fn abandon(&mut self) -> Result<(), TaskError> {
        self.rebuilt = None;
        self.space = None;
        if let Some(arrival) = self.arrival.take() {
            arrival.forget()?;
        }
        Ok(())
    }
}
