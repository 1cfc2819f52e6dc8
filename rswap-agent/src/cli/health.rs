//! `rswap health`: whether the agent answers and does its work, as an exit status.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::bail;
use clap::Args;
use serde::Deserialize;

use super::{Session, print_json};
use crate::units::UnixMillis;

/// How often it is looked again.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// An agent that has come so far has been through all that it does again and again.
const WINDOWS: u64 = 2;

#[derive(Debug, Args)]
pub(super) struct HealthArguments {
    /// How long the agent may take to be in order, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    within: u64,
    /// Print the agent's status as JSON
    #[arg(long)]
    json: bool,
}

/// What of the agent's status says how it is.
#[derive(Debug, Deserialize)]
struct Seen {
    version: String,
    at: UnixMillis,
    windows: u64,
    instances: usize,
    #[serde(default)]
    links: Option<Links>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Links {
    valid_until: Option<UnixMillis>,
    problem: Option<String>,
}

/// What is amiss, if anything is. Pure.
fn amiss(seen: &Seen) -> Option<String> {
    let own = env!("CARGO_PKG_VERSION");
    if seen.version != own {
        return Some(format!("the agent is of version {}, and this is {own}", seen.version));
    }
    if seen.links.as_ref().and_then(|links| links.valid_until).is_some_and(|until| until <= seen.at) {
        return Some("its certificate has expired: no other host speaks to it".to_owned());
    }
    (seen.windows < WINDOWS)
        .then(|| format!("it has looked {} times at what runs, of {WINDOWS}", seen.windows))
}

pub(super) async fn health(session: &Session, arguments: HealthArguments) -> anyhow::Result<ExitCode> {
    let deadline = Instant::now() + Duration::from_secs(arguments.within);
    loop {
        let answer = session.client.get::<serde_json::Value>("/v1/status").await;
        let problem = match answer {
            Err(error) => format!("{:#}", anyhow::Error::new(error)),
            Ok(status) => {
                let seen: Seen = serde_json::from_value(status.clone())?;
                match amiss(&seen) {
                    Some(problem) => problem,
                    None if arguments.json => {
                        print_json(&status)?;
                        return Ok(ExitCode::SUCCESS);
                    }
                    None => {
                        println!("in order: version {}, {} instances", seen.version, seen.instances);
                        if let Some(problem) = seen.links.and_then(|links| links.problem) {
                            println!("to be seen to: {problem}");
                        }
                        return Ok(ExitCode::SUCCESS);
                    }
                }
            }
        };
        if Instant::now() >= deadline {
            bail!("not in order after {} s: {problem}", arguments.within);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(windows: u64, valid_until: Option<u64>) -> Seen {
        let links = Some(Links { valid_until: valid_until.map(UnixMillis), problem: None });
        Seen {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            at: UnixMillis(1000),
            windows,
            instances: 0,
            links,
        }
    }

    #[test]
    fn an_agent_is_in_order_when_it_works_and_can_speak_to_others() {
        assert_eq!(amiss(&seen(2, None)), None);
        assert_eq!(amiss(&seen(2, Some(1001))), None);
        assert!(amiss(&seen(2, Some(1000))).unwrap().contains("expired"));
        assert!(amiss(&seen(1, None)).unwrap().contains("1 times"));
        let other = Seen { version: "0.0.0".to_owned(), ..seen(9, None) };
        assert!(amiss(&other).unwrap().contains("0.0.0"));
    }
}
