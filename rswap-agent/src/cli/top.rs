//! `top`: instances as they fare, in the terminal, until somebody has seen enough.
//!
//! ```text
//! agent -> span (times of the last window, minute or hour; pure) -> model (what is listed, in which order; what keys do; pure) -> view (lines and tables; pure) -> terminal
//! ```

mod model;
mod span;
mod view;

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEvent, KeyEventKind},
};
use tokio::{
    sync::mpsc,
    time::{self, MissedTickBehavior},
};

use self::model::{Model, Then};
use crate::{control::client::Client, units::UnixMillis};

/// How often the thread that reads keys looks whether anybody still wants them.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, Args)]
pub(super) struct TopArguments {
    /// How often the agent is asked, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    every: u64,
}

/// Shows the agent's instances until `q` is pressed.
pub(super) async fn top(client: &Client, arguments: TopArguments) -> anyhow::Result<()> {
    ensure!(
        io::stdout().is_terminal() && io::stdin().is_terminal(),
        "`rswap top` needs a terminal: scripts have `rswap ps --json`"
    );
    // Whatever stands against it is said before the screen is taken.
    let mut model = Model::default();
    ask(client, &mut model).await?;
    let mut terminal = ratatui::try_init().context("taking the terminal")?;
    let ended = show(&mut terminal, client, model, arguments).await;
    ratatui::try_restore().context("giving the terminal back")?;
    ended
}

async fn show(
    terminal: &mut DefaultTerminal,
    client: &Client,
    mut model: Model,
    arguments: TopArguments,
) -> anyhow::Result<()> {
    let mut events = events();
    let mut ticks = time::interval(Duration::from_millis(arguments.every));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        terminal.draw(|frame| view::draw(frame, &mut model))?;
        tokio::select! {
            _ = ticks.tick() => {}
            event = events.recv() => match event.context("the terminal is gone")?.map(|key| model.press(key)) {
                Some(Then::End) => return Ok(()),
                Some(Then::Ask) => {}
                // A key that needs nothing more, or the window has another size.
                _ => continue,
            },
        }
        if let Err(error) = ask(client, &mut model).await {
            model.lose(format!("{error:#}"));
        }
    }
}

/// Asks the agent for what is shown. Spans are added up by it when they are asked for, so that they are asked for only where they are shown.
async fn ask(client: &Client, model: &mut Model) -> anyhow::Result<()> {
    let views = client.get("/v1/profiles").await?;
    let distributions = match model.distributions_wanted() {
        Some(route) => client.get(&route).await?,
        None => Vec::new(),
    };
    model.take(views, distributions, UnixMillis::now());
    Ok(())
}

/// Keys that are pressed; nothing for other events. Read by a thread of its own, since reading blocks.
fn events() -> mpsc::Receiver<Option<KeyEvent>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let event = match event::poll(LOOK_EVERY) {
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            let told = match event {
                Ok(Event::Key(key)) if key.kind == KeyEventKind::Press => sender.blocking_send(Some(key)),
                Ok(_) => sender.blocking_send(None),
                Err(_) => return,
            };
            if told.is_err() {
                return;
            }
        }
    });
    receiver
}
