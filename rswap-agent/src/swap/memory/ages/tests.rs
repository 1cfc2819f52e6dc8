use super::*;

const COLD_AFTER_MS: u64 = 10_000;
const LOOK_MS: u64 = 1000;

/// Memory of some regions, some of whose pages are used between looks.
struct Memory {
    ages: Ages,
    regions: BTreeMap<u64, Residency>,
    now: UnixMillis,
    /// By region: pages that are used in the interval after each look.
    used: BTreeMap<u64, u64>,
    /// Pages that can't be paged out.
    stuck: u64,
    faults: u64,
    mended: u64,
}

impl Memory {
    fn of(regions: u64) -> Self {
        let all = Residency { present: u64::MAX, ..Residency::default() };
        Self {
            ages: Ages::new(COLD_AFTER_MS, 7),
            regions: (0..regions).map(|n| (n * REGION_BYTES, all)).collect(),
            now: UnixMillis(1_000_000),
            used: BTreeMap::new(),
            stuck: 0,
            faults: 0,
            mended: 0,
        }
    }

    /// One look after the interval's use; returns how many pages went out.
    fn look(&mut self, most: u64) -> u64 {
        self.now.0 += LOOK_MS;
        for (start, used) in &self.used {
            let region = self.regions.get_mut(start).unwrap();
            let back = region.swapped & used;
            self.faults += u64::from(back.count_ones());
            *region =
                Residency { present: region.present | back, swapped: region.swapped & !back, ..*region };
        }
        self.ages.see(self.now, &self.regions);
        for start in self.ages.take_to_mend() {
            self.mended += 1;
            for (_, region) in self.regions.range_mut(start..start + HUGE_BYTES) {
                *region = Residency { present: u64::MAX, swapped: 0, huge: true };
            }
        }
        let chosen = self.ages.choose(self.now, most);
        let mut out = 0;
        for pages in chosen {
            let region = &self.regions[&pages.start];
            assert_eq!(pages.pages & !region.present, 0, "only what is in memory can go");
            let gone = pages.pages & !self.stuck;
            self.split(huge_page(pages.start));
            let region = self.regions.get_mut(&pages.start).unwrap();
            *region =
                Residency { present: region.present & !gone, swapped: region.swapped | gone, ..*region };
            out += u64::from(pages.pages.count_ones());
            self.ages.went(self.now, pages, *region);
        }
        out
    }

    fn split(&mut self, huge: u64) {
        for (_, region) in self.regions.range_mut(huge..huge + HUGE_BYTES) {
            region.huge = false;
        }
    }

    fn looks(&mut self, number: u64) {
        for _ in 0..number {
            self.look(u64::MAX);
        }
    }

    fn out(&self, region: u64) -> u32 {
        self.regions[&(region * REGION_BYTES)].swapped.count_ones()
    }
}

#[test]
fn what_is_never_used_goes_when_it_is_old_enough_and_not_before() {
    let mut memory = Memory::of(3);
    memory.looks(COLD_AFTER_MS / LOOK_MS);
    assert_eq!(memory.out(1), PROBES, "probes only");
    assert!(!memory.ages.is_settled());
    memory.looks(3);
    assert_eq!((memory.out(0), memory.out(1), memory.out(2)), (64, 64, 64));
    assert!(memory.ages.is_settled());
}

#[test]
fn what_is_used_stays_and_is_asked_less_and_less() {
    let mut memory = Memory::of(2);
    memory.used.insert(0, u64::MAX);
    memory.looks(200);
    assert_eq!((memory.out(0), memory.out(1)), (0, 64));
    // 200 s: at first, and then after 20, 40, 80 s of grace.
    assert!((3..=5).contains(&memory.faults), "{} faults", memory.faults);
}

#[test]
fn a_few_used_pages_among_cold_ones_come_back_and_stay() {
    let mut memory = Memory::of(1);
    memory.used.insert(0, 0b111);
    memory.looks(60);
    assert_eq!(memory.out(0), 61);
    let before = memory.faults;
    memory.looks(600);
    assert_eq!(memory.out(0), 61);
    assert!(memory.faults - before <= 60, "{} faults in 600 s", memory.faults - before);
}

#[test]
fn what_was_used_and_is_no_longer_goes_after_all() {
    let mut memory = Memory::of(1);
    memory.used.insert(0, u64::MAX);
    memory.looks(30);
    assert_eq!(memory.out(0), 0);
    memory.used.clear();
    memory.looks(200);
    assert_eq!(memory.out(0), 64);
}

#[test]
fn no_more_than_is_allowed_goes_at_a_time_the_coldest_first() {
    let mut memory = Memory::of(10);
    memory.looks(5);
    memory.used.insert(0, u64::MAX);
    memory.looks(1);
    memory.used.clear();
    // All others are cold by now.
    memory.now.0 += COLD_AFTER_MS - 2 * LOOK_MS;
    assert_eq!(memory.look(100), 100);
    assert_eq!(memory.look(0), 0);
    assert!(memory.out(0) < PROBES, "it was used last");
}

#[test]
fn what_can_t_go_is_not_asked_again_and_again() {
    let mut memory = Memory::of(1);
    memory.stuck = u64::MAX;
    let asked: u64 = (0..100).map(|_| memory.look(u64::MAX)).sum();
    assert_eq!(memory.out(0), 0);
    assert!(asked <= 30, "{asked} times in 100 s");
}

#[test]
fn pages_that_are_in_swap_already_are_probes_too() {
    let mut memory = Memory::of(1);
    memory.regions.insert(0, Residency { present: u64::MAX << 32, swapped: u64::MAX >> 32, huge: false });
    memory.looks(COLD_AFTER_MS / LOOK_MS);
    assert_eq!(memory.out(0), 32, "the agent has just begun to look");
    memory.looks(2);
    assert_eq!(memory.out(0), 64);
}

#[test]
fn what_is_unmapped_is_forgotten() {
    let mut memory = Memory::of(2);
    memory.looks(3);
    memory.regions.remove(&0);
    memory.looks(1);
    assert_eq!(memory.ages.regions.len(), 1);
}

#[test]
fn some_pages_are_as_many_as_asked_for_and_of_those_given() {
    let mut random = 1;
    for wanted in 0..70 {
        let pages = 0xf0f0_f0f0_0000_ffff_u64;
        let chosen = some_of(pages, wanted, &mut random);
        assert_eq!(chosen.count_ones(), wanted.min(pages.count_ones()));
        assert_eq!(chosen & !pages, 0);
    }
    assert_eq!(first(0b1011_0000, 2), 0b0011_0000);
    assert_eq!(first(u64::MAX, u64::MAX), u64::MAX);
}

/// Of four huge pages one is used, and one in a single page.
#[test]
fn huge_pages_in_use_are_put_together_again_and_cold_ones_go() {
    let per_page = HUGE_BYTES / REGION_BYTES;
    let mut memory = Memory::of(4 * per_page);
    memory.regions.values_mut().for_each(|region| region.huge = true);
    for region in 0..per_page {
        memory.used.insert(region * REGION_BYTES, u64::MAX);
    }
    memory.used.insert((per_page + 3) * REGION_BYTES, 1 << 9);
    memory.looks(200);
    let out =
        |memory: &Memory, page: u64| -> u32 { (0..per_page).map(|n| memory.out(page * per_page + n)).sum() };
    assert!(memory.ages.is_settled());
    assert_eq!((out(&memory, 2), out(&memory, 3)), (512, 512));
    assert_eq!(out(&memory, 0), 0);
    assert!((0..per_page).all(|n| memory.regions[&(n * REGION_BYTES)].huge), "it was split and left so");
    // What is cold but for a page is not brought back for that.
    assert_eq!(out(&memory, 1), 511);
    assert!((1..=5).contains(&memory.mended), "{} times in 200 s", memory.mended);
}
