//! A page of documentation whose commands are carried out word for word.
//!
//! What a reader goes by is what a test goes by: the paragraph before a block of commands names in bold where they are given, with
//! `until it says` it is tried again for a while, and a block of text after it is what they answer, line by line, with `…` for what
//! differs. A block that is not to be carried out says so (```` ```sh not-in-the-test ````).

use std::ops::Range;

use anyhow::{Context, bail, ensure};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// What stands for anything in an answer.
const ANYTHING: char = '…';
/// How a paragraph says that the commands after it are given again until the answer comes.
const UNTIL: &str = "until it says";

/// Commands that are given at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The heading that they are under.
    pub heading: String,
    /// Their number under this heading, from 0; those that are not carried out are counted, too.
    pub number: usize,
    /// The line of the page at which they begin.
    pub line: usize,
    /// Where they are given, in this order.
    pub places: Vec<String>,
    /// Whether they are given again until they say what is expected.
    pub until: bool,
    /// The commands, as they are in the page.
    pub script: String,
    /// What they say: lines in this order, with others between them.
    pub expected: Vec<String>,
    /// Whether they are carried out at all.
    pub carried_out: bool,
}

/// What a page has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guide {
    /// Its commands, in order.
    pub steps: Vec<Step>,
    /// Its pieces of configuration, each with the line at which it begins.
    pub configurations: Vec<(usize, String)>,
}

/// What is known where a block begins.
#[derive(Default)]
struct Before {
    heading: String,
    in_heading: bool,
    /// Of the paragraph that ends right here.
    text: String,
    bold: Vec<String>,
    in_bold: bool,
    /// A block of commands ends right here.
    commands: bool,
}

impl Guide {
    /// Reads a page; `places` are all that there are.
    ///
    /// # Errors
    ///
    /// A block that nobody would know what to do with: of another kind, or commands without a place.
    pub fn parse(page: &str, places: &[&str]) -> anyhow::Result<Self> {
        let mut guide = Self::default();
        let mut before = Before::default();
        let mut events = Parser::new_ext(page, Options::ENABLE_TABLES).into_offset_iter();
        while let Some((event, Range { start, .. })) = events.next() {
            let line = page[..start].matches('\n').count() + 1;
            match event {
                Event::Start(Tag::CodeBlock(kind)) => {
                    let mut text = String::new();
                    for (event, _) in events.by_ref() {
                        match event {
                            Event::Text(part) => text += &part,
                            _ => break,
                        }
                    }
                    guide
                        .block(&kind, text, line, &mut before, places)
                        .with_context(|| format!("line {line}"))?;
                }
                Event::Start(Tag::Heading { .. }) => {
                    before = Before { in_heading: true, ..Before::default() };
                }
                Event::End(TagEnd::Heading(_)) => before.in_heading = false,
                Event::Start(Tag::Strong) => before.bold_begins(),
                Event::End(TagEnd::Strong) => before.in_bold = false,
                Event::Start(Tag::Paragraph | Tag::Item | Tag::List(_) | Tag::Table(_)) | Event::Rule => {
                    before = Before { heading: before.heading, ..Before::default() };
                }
                Event::Text(part) | Event::Code(part) => before.says(&part),
                Event::SoftBreak | Event::HardBreak => before.says(" "),
                _ => {}
            }
        }
        Ok(guide)
    }

    fn block(
        &mut self,
        kind: &CodeBlockKind<'_>,
        text: String,
        line: usize,
        before: &mut Before,
        places: &[&str],
    ) -> anyhow::Result<()> {
        let CodeBlockKind::Fenced(info) = kind else {
            bail!("an indented block: say by a fence whether these are commands");
        };
        let commands = std::mem::take(&mut before.commands);
        match &**info {
            "sh" | "sh not-in-the-test" => {
                let named: Vec<String> =
                    before.bold.iter().filter(|name| places.contains(&name.as_str())).cloned().collect();
                ensure!(!named.is_empty(), "the paragraph before these commands names no place for them");
                ensure!(before.text.ends_with(':'), "the paragraph before these commands is not about them");
                let number = self.steps.iter().filter(|step| step.heading == before.heading).count();
                self.steps.push(Step {
                    heading: before.heading.clone(),
                    number,
                    line,
                    places: named,
                    until: before.text.contains(UNTIL),
                    script: text,
                    expected: Vec::new(),
                    carried_out: &**info == "sh",
                });
                before.commands = true;
            }
            "text" => {
                ensure!(commands, "an answer without commands before it");
                let step = self.steps.last_mut().context("an answer without commands before it")?;
                step.expected = text.lines().map(str::to_owned).collect();
            }
            "toml" => self.configurations.push((line, text)),
            other => bail!("a block of {other:?}, which is none of sh, text and toml"),
        }
        // Each block has a paragraph of its own.
        before.text.clear();
        before.bold.clear();
        Ok(())
    }

    /// Whether each step that waits for an answer has one.
    ///
    /// # Errors
    ///
    /// The first that has none.
    pub fn check(&self) -> anyhow::Result<()> {
        let mute = self.steps.iter().find(|step| step.until && step.expected.is_empty());
        ensure!(mute.is_none(), "line {}: nothing says until when", mute.map_or(0, |step| step.line));
        Ok(())
    }
}

impl Before {
    fn bold_begins(&mut self) {
        self.in_bold = true;
        self.bold.push(String::new());
    }

    fn says(&mut self, part: &str) {
        if self.in_heading {
            self.heading += part;
            return;
        }
        self.text += part;
        if let Some(bold) = self.bold.last_mut().filter(|_| self.in_bold) {
            *bold += part;
        }
    }
}

/// The first line of `expected` that `said` does not have after those before it.
pub fn missing<'a>(expected: &'a [String], said: &str) -> Option<&'a str> {
    let mut lines = said.lines();
    expected.iter().find(|line| !lines.any(|said| fits(line, said))).map(String::as_str)
}

/// Whether a line is as expected. How wide the columns of a table are is nobody's matter.
fn fits(expected: &str, said: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (expected, said) = (plain(expected), plain(said));
    let mut parts = expected.split(ANYTHING).map(str::trim);
    let Some(mut rest) = said.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut last = None;
    for part in parts {
        if let Some(between) = last.replace(part) {
            let Some(at) = rest.find(between) else { return false };
            rest = &rest[at + between.len()..];
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: &[&str] = &["a", "b"];

    fn parse(page: &str) -> anyhow::Result<Guide> {
        Guide::parse(page, PLACES)
    }

    #[test]
    fn commands_have_places_and_answers_as_a_reader_sees_them() {
        let page = "# Top\n\nOn **a** and\n**b**:\n\n```sh\none\ntwo\n```\n\n```text\nyes …\n```\n\n## Next `one`\n\n**Mind:** on **b**, until it says:\n\n\
                    ```sh\nthree\n```\n\n```text\nno\n```\n\nBy hand, on **a**:\n\n```sh not-in-the-test\nfour\n```\n\n```toml\nx = 1\n```\n";
        let guide = parse(page).expect("a guide");
        let told: Vec<_> = guide
            .steps
            .iter()
            .map(|step| (&*step.heading, step.number, &*step.script, step.places.join(" "), step.until))
            .collect();
        assert_eq!(
            told,
            [
                ("Top", 0, "one\ntwo\n", "a b".to_owned(), false),
                ("Next one", 0, "three\n", "b".to_owned(), true),
                ("Next one", 1, "four\n", "a".to_owned(), false),
            ]
        );
        assert_eq!(guide.steps.iter().map(|step| step.line).collect::<Vec<_>>(), [6, 19, 29]);
        assert_eq!(guide.steps.iter().map(|step| step.carried_out).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(guide.steps[0].expected, ["yes …"]);
        assert_eq!(guide.configurations, [(33, "x = 1\n".to_owned())]);
        guide.check().expect("all are answered");
    }

    #[test]
    fn what_nobody_would_know_what_to_do_with_is_an_error() {
        for (page, why) in [
            ("Somewhere:\n\n```sh\none\n```\n", "names no place"),
            ("On **c**:\n\n```sh\none\n```\n", "names no place"),
            ("On **a**:\n\n- other\n\n```sh\none\n```\n", "names no place"),
            ("On **a**:\n\n```sh\none\n```\n\n```sh\ntwo\n```\n", "names no place"),
            ("**a** is a host.\n\n```sh\none\n```\n", "not about them"),
            ("On **a**:\n\n    one\n", "indented"),
            ("On **a**:\n\n```bash\none\n```\n", "none of sh"),
            ("On **a**:\n\n```text\none\n```\n", "without commands"),
        ] {
            let error = parse(page).expect_err(page);
            assert!(format!("{error:#}").contains(why), "{page:?}: {error:#}");
        }
        let endless = parse("On **a**, until it says:\n\n```sh\none\n```\n").expect("a guide");
        assert!(endless.check().is_err());
    }

    #[test]
    fn an_answer_is_what_is_expected_in_this_order_and_may_have_more() {
        let said = "HOST   STATE\nalpha  ready used - 2 10.0.0.1:1\nbeta   away  used - 0 10.0.0.2:1\n";
        let missing = |expected: &[&str]| {
            let expected: Vec<String> = expected.iter().map(|line| (*line).to_owned()).collect();
            super::missing(&expected, said).map(str::to_owned)
        };
        assert_eq!(missing(&["alpha ready used …", "beta away … 0 …"]), None);
        assert_eq!(missing(&["…ready…", "beta … 10.0.0.2:1"]), None);
        assert_eq!(missing(&["HOST STATE"]), None);
        for wrong in [
            &["beta …", "alpha …"] as &[&str],
            &["alpha"],
            &["alpha … 10.0.0.1"],
            &["ready …"],
            &["alpha away …"],
            &["alpha …", "alpha …"],
        ] {
            assert!(missing(wrong).is_some(), "{wrong:?}");
        }
    }
}
