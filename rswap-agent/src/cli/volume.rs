//! `swap --volume`: a line per pass, and what it took.

use std::process::ExitCode;

use super::{SwapArguments, table::bytes};
use crate::{
    control::{
        SwapVolumeEvent, SwapVolumeRequest,
        client::{Client, ClientError},
    },
    instance::InstanceName,
    swap::storage::{StorageProgress, StorageReport},
};

const PATH: &str = "/v1/swap-volume";

pub(super) async fn swap(
    client: &Client,
    arguments: SwapArguments,
    volume: InstanceName,
) -> anyhow::Result<ExitCode> {
    let SwapArguments { instance, pool, output, .. } = arguments;
    let request = SwapVolumeRequest { instance, volume, pool };
    let mut events = client.post_stream(PATH, &request).await?;
    while let Some(event) = events.next::<SwapVolumeEvent>().await? {
        if output.json {
            println!("{}", serde_json::to_string(&event)?);
        }
        match event {
            SwapVolumeEvent::Progress(progress) if !output.json => println!("{}", line(&progress)),
            SwapVolumeEvent::Progress(_) => {}
            SwapVolumeEvent::Done(report) => {
                if !output.json {
                    println!("{}", summary(&request, &report));
                }
                return Ok(ExitCode::SUCCESS);
            }
            SwapVolumeEvent::Failed(error) => {
                eprintln!("rswap: the volume {} of {} stays: {error}", request.volume, request.instance);
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Err(ClientError::Cut(PATH.to_owned()).into())
}

fn line(progress: &StorageProgress) -> String {
    let StorageProgress { passes, bytes_copied, expected_ms } = progress;
    format!(
        "pass {passes}: {} copied, expected unavailability {expected_ms:.1} ms",
        bytes(*bytes_copied as f64)
    )
}

fn summary(request: &SwapVolumeRequest, report: &StorageReport) -> String {
    format!(
        "{} of {} is in {} now ({}): moved in {:.0} ms, unavailable {:.1} ms, {} passes, {} copied, {} shared, {} open files and \
         mappings re-homed",
        request.volume,
        request.instance,
        request.pool,
        report.directory.display(),
        report.duration_ms,
        report.unavailability_ms,
        report.passes,
        bytes(report.bytes_copied as f64),
        bytes(report.bytes_shared as f64),
        report.rehomed,
    )
}
