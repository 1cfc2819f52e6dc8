//! `top`: instances as they fare, in the terminal, until somebody has seen enough.
//!
//! ```text
//! agent -> model (what is listed, in which order; what keys do; pure) -> view (lines and tables; pure) -> terminal
//! ```

mod model;
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
use crate::{control::client::Client, status::InstanceView, units::UnixMillis};

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
    model.take(client.get("/v1/profiles").await?, UnixMillis::now());
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
            _ = ticks.tick() => match client.get::<Vec<InstanceView>>("/v1/profiles").await {
                Ok(views) => model.take(views, UnixMillis::now()),
                Err(error) => model.lose(format!("{error:#}")),
            },
            event = events.recv() => match event.context("the terminal is gone")? {
                Some(key) if model.press(key) == Then::End => return Ok(()),
                // A key, or the window has another size.
                _ => {}
            },
        }
    }
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
