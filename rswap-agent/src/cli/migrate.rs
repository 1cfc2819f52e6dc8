//! `migrate`: a bar on a terminal, plain lines elsewhere.

use std::{io::IsTerminal, process::ExitCode};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    MigrateArguments,
    table::{bytes, or_dash},
};
use crate::{
    control::{
        MigrateEvent, MigrateRequest,
        client::{Client, ClientError},
    },
    status::{MigrationProgress, MigrationReport},
};

pub(super) async fn migrate(client: &Client, arguments: MigrateArguments) -> anyhow::Result<ExitCode> {
    let request = MigrateRequest {
        instance: arguments.instance,
        host: arguments.host,
        stop_and_copy: arguments.stop_and_copy,
    };
    let mut events = client.post_stream("/v1/migrate", &request).await?;
    let mut shown = Shown::new(arguments.json);
    while let Some(event) = events.next::<MigrateEvent>().await? {
        shown.event(&event)?;
        match event {
            MigrateEvent::Progress(_) => {}
            MigrateEvent::Done(_) => return Ok(ExitCode::SUCCESS),
            MigrateEvent::InDoubt(error) => {
                eprintln!(
                    "rswap: {} is frozen here, and may run at {}: {error}",
                    request.instance, request.host
                );
                return Ok(ExitCode::FAILURE);
            }
            MigrateEvent::Failed(error) => {
                eprintln!("rswap: {} stays here: {error}", request.instance);
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Err(ClientError::Cut("/v1/migrate".to_owned()).into())
}

enum Shown {
    Json,
    Bar(ProgressBar),
    Lines { last: Option<(String, u32)> },
}

impl Shown {
    fn new(json: bool) -> Self {
        if json {
            Self::Json
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{prefix:>16} [{bar:24}] {pos}/{len} pages  {wide_msg}");
            bar.set_style(style.expect("the template is valid").progress_chars("=> "));
            Self::Bar(bar)
        } else {
            Self::Lines { last: None }
        }
    }

    fn event(&mut self, event: &MigrateEvent) -> anyhow::Result<()> {
        match (self, event) {
            (Self::Json, event) => println!("{}", serde_json::to_string(event)?),
            (Self::Bar(bar), MigrateEvent::Progress(progress)) => {
                bar.set_prefix(format!("{} {}", progress.phase, progress.round));
                bar.set_length(progress.round_pages);
                bar.set_position(progress.round_pages_sent);
                bar.set_message(rates(progress));
            }
            (Self::Lines { last }, MigrateEvent::Progress(progress)) => {
                let now = (progress.phase.clone(), progress.round);
                if last.as_ref() != Some(&now) {
                    println!("{} {}: {} pages, {}", now.0, now.1, progress.round_pages, rates(progress));
                    *last = Some(now);
                }
            }
            (Self::Bar(bar), MigrateEvent::Done(report)) => {
                bar.finish_and_clear();
                println!("{}", summary(report));
            }
            (Self::Lines { .. }, MigrateEvent::Done(report)) => println!("{}", summary(report)),
            (Self::Bar(bar), MigrateEvent::Failed(_) | MigrateEvent::InDoubt(_)) => bar.finish_and_clear(),
            (Self::Lines { .. }, MigrateEvent::Failed(_) | MigrateEvent::InDoubt(_)) => {}
        }
        Ok(())
    }
}

fn rates(progress: &MigrationProgress) -> String {
    format!(
        "{} sent, {}/s, dirty {}/s, expected unavailability {} ms",
        bytes(progress.bytes_sent as f64),
        bytes(progress.bytes_per_s),
        or_dash(progress.dirty_bytes_per_s.map(bytes)),
        or_dash(progress.expected_unavailability_ms.map(|ms| format!("{ms:.1}"))),
    )
}

fn summary(report: &MigrationReport) -> String {
    format!(
        "moved in {} ms: unavailable {:.1} ms, {} rounds, {} pages ({} dirtied meanwhile), {} sent",
        report.duration_ms,
        report.unavailability_ms,
        report.rounds,
        report.pages_sent,
        report.pages_dirtied,
        bytes(report.bytes_sent as f64),
    )
}
