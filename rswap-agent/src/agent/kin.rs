//! Whom an instance learns from, and whom it teaches.
//!
//! Its class is its label of the first of `learnt.class_labels` that it has; without one, the program of its main process, and the
//! user that it runs as. Its identity is its name and its command (or its program, where it was adopted). All of this goes along
//! when it migrates, so both hosts say the same.

use crate::{
    forecast::Kin,
    instance::{Instance, main_process::MainProcess},
};

/// Longest class or identity, in bytes: what is longer is told apart by a hash.
const LONGEST: usize = 160;

/// The kin of an instance with this main process. Without one, and without a label, it is of no class yet.
pub(super) fn of(instance: &Instance, main: Option<&MainProcess>, class_labels: &[String]) -> Kin {
    let label = class_labels.iter().find_map(|key| Some((key, instance.labels.get(key)?)));
    let class = match (label, main) {
        (Some((key, value)), _) => format!("{key}={value}"),
        (None, Some(MainProcess { image, uid })) => format!("{image} uid {uid}"),
        (None, None) => String::new(),
    };
    let does = match (instance.command.is_empty(), main) {
        (true, Some(main)) => main.image.clone(),
        _ => instance.command.join(" "),
    };
    Kin { class: short(class), identity: short(format!("{} {does}", instance.name)) }
}

fn short(text: String) -> String {
    if text.len() <= LONGEST {
        return text;
    }
    let hash = xxhash_rust::xxh3::xxh3_64(text.as_bytes());
    let end = text.floor_char_boundary(LONGEST - 17);
    format!("{} {hash:016x}", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Origin;

    fn instance(labels: &[(&str, &str)], command: &[&str]) -> Instance {
        Instance {
            name: "shop".parse().unwrap(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            cgroup: "/nowhere".into(),
            cgroup_id: 1,
            origin: Origin::Run,
            init_pid: Some(1),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: Default::default(),
        }
    }

    #[test]
    fn a_label_comes_before_the_program() {
        let keys = ["class".to_owned(), "app".to_owned()];
        let main = MainProcess { image: "redis-server".to_owned(), uid: 999 };
        let labelled = instance(&[("app", "cache"), ("tier", "x")], &["redis-server", "--port", "1"]);
        let kin = of(&labelled, Some(&main), &keys);
        assert_eq!((kin.class.as_str(), kin.identity.as_str()), ("app=cache", "shop redis-server --port 1"));
        let both = instance(&[("app", "cache"), ("class", "db")], &[]);
        let kin = of(&both, Some(&main), &keys);
        assert_eq!((kin.class.as_str(), kin.identity.as_str()), ("class=db", "shop redis-server"));
        assert_eq!(of(&both, Some(&main), &[]).class, "redis-server uid 999");
        assert_eq!(of(&instance(&[], &["x"]), None, &keys).class, "");
    }

    #[test]
    fn long_ones_are_short_and_differ() {
        let kin = |end: &str| of(&instance(&[], &["x", &"\u{e9}".repeat(200), end]), None, &[]).identity;
        assert!(kin("a").len() <= LONGEST && kin("a") != kin("b"), "{}", kin("a"));
    }
}
