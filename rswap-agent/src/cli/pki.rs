//! `pki`: an authority for a fleet that has none, and certificates for its hosts.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use clap::{Args, Subcommand};
use rswap_trust::{Authority, Name, Role, Validity};

/// Clocks of hosts differ.
const BEFORE: Duration = Duration::from_secs(300);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Args)]
pub(super) struct PkiArguments {
    #[command(subcommand)]
    command: PkiCommand,
}

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Make an authority: a directory with a key that signs, for its owner only. Keep it away from the hosts
    Init {
        /// The directory; nothing in it is overwritten
        directory: PathBuf,
        /// What certificates name as the fleet: hosts of another are refused
        #[arg(long, default_value = "fleet")]
        domain: String,
        /// How long its certificate is valid
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Issue a certificate with a new key: for a host, or for whoever directs agents
    Issue {
        /// The authority's directory
        directory: PathBuf,
        /// Its name; of a host, what the host pools of the others call it
        name: Name,
        /// What it is: agent, controller or operator
        #[arg(long, default_value = "agent")]
        role: Role,
        /// Where ca.pem, certificate.pem and key.pem are put [default: issued/NAME in the authority's directory]
        #[arg(long, value_name = "DIRECTORY")]
        to: Option<PathBuf>,
        /// How long it is valid
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// Exchange what was issued before
        #[arg(long)]
        again: bool,
    },
    /// Exchange the authority's key: first both the new and the old are trusted, with --finish only the new
    Rotate {
        /// The authority's directory
        directory: PathBuf,
        /// Trust the old key no longer. Only when every host has a certificate of the new one
        #[arg(long)]
        finish: bool,
        /// How long the new one's certificate is valid
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
}

fn valid(days: u32) -> anyhow::Result<Validity> {
    let now = SystemTime::now();
    let from = now.checked_sub(BEFORE).context("the clock is at the beginning of time")?;
    let until = now.checked_add(DAY * days).context("so far ahead no clock can show")?;
    Ok(Validity { from, until })
}

pub(super) fn run(arguments: &PkiArguments) -> anyhow::Result<()> {
    match &arguments.command {
        PkiCommand::Init { directory, domain, days } => {
            let made = Authority::init(directory, domain, valid(*days)?)?;
            println!("authority of {} in {}", made.domain(), directory.display());
            println!("next, for each host: rswap pki issue {} NAME", directory.display());
        }
        PkiCommand::Issue { directory, name, role, to, days, again } => {
            let authority = Authority::open(directory)?;
            let to = to.clone().unwrap_or_else(|| directory.join("issued").join(name.as_str()));
            let issued = authority.issue(name, *role, valid(*days)?, &to, *again)?;
            println!("# {}: bring these three to the host, the key for root only", issued.identity);
            println!("[tls]");
            println!("ca = {:?}", issued.ca);
            println!("certificate = {:?}", issued.certificate);
            println!("key = {:?}", issued.key);
        }
        PkiCommand::Rotate { directory, finish: false, days } => {
            Authority::rotate(directory, valid(*days)?)?;
            let at = directory.display();
            println!("1. bring {at}/ca.pem to every host: it names the old key and the new one");
            println!("2. rswap pki issue {at} NAME --again, for every host, and bring what it makes there");
            println!("3. rswap pki rotate {at} --finish, and bring {at}/ca.pem to every host");
        }
        PkiCommand::Rotate { directory, finish: true, .. } => {
            Authority::finish_rotation(directory)?;
            println!("bring {}/ca.pem to every host: it names the new key only", directory.display());
        }
    }
    Ok(())
}
