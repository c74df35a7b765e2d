//! What an access of workgroup memory costs, by the rules of an architecture: the cycles for which it holds the
//! memory's pipe, here called *passes*.
//!
//! Workgroup memory lies in banks of 32-bit words, neighbouring words in neighbouring banks, and a bank gives one word
//! per cycle. A subgroup's access is served in *phases*, runs of lanes whose words could fill all banks once: 32 lanes
//! of 4 bytes, 16 of 8 or 8 of 16 where there are 32 banks. A phase takes as many passes as the worst bank has
//! different words asked of it, at least one; lanes that ask for the same word are served together. [`Rules::passes`]
//! counts that, from the addresses of one subgroup's lanes. Nothing here is measured, and where sources are silent or
//! disagree the rule is the one with more passes. Invariant: pure functions of their arguments.
//!
//! # Rules and their sources
//! - All: two lanes in one word do not conflict, whatever bytes of it they mean and whether they read or write (CUDA
//!   C++ Programming Guide, "Shared Memory" of compute capability 5.x and later; the others are taken to do the same).
//!   An access of 12 bytes is one of 8 and one of 4. A phase without an active lane costs a pass as long as one of the
//!   32 lanes around it is active: that hardware skips it is documented nowhere.
//! - NVIDIA Ampere, Ada: 32 banks, and 128 bytes per cycle on the way back to registers. Phases of 8 and 16 bytes are
//!   half and quarter warps: NVIDIA's slides on cuTENSOR (GTC 2019, S9593, pointed to in
//!   <https://github.com/Dao-AILab/flash-attention/issues/738>). Loads are twice as fast if in every pair of lanes that
//!   differ in bit 0 of their number, or in every pair that differ in bit 1, both read the same address:
//!   <https://forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228>, said of compute capability
//!   7.0 to 7.5 and taken to hold since. So 16 bytes that all lanes share take two passes, not one.
//! - AMD RDNA 2, 3, 4: a compute unit has 32 banks (the instruction-set guides: 64 per workgroup processor, 32 for each
//!   pair of SIMDs). 32, 16 and 8 lanes per phase of 4, 8 and 16 bytes, as AMD's own model has it for everything but
//!   one CDNA 4 (`LDSBankModel.cpp` of rocRoller, <https://github.com/ROCm/rocm-libraries/pull/2157>). Which eight
//!   lanes share a phase of a 16-byte load changed with RDNA 4, where they follow each other:
//!   <https://github.com/triton-lang/triton/pull/11365>. Before it only CDNA's are public: lanes 0 to 3 go with 20 to
//!   23, 4 to 7 with 16 to 19, and so on. Whether RDNA 2 and 3 have those or others nobody says, so such a load costs
//!   the worse of the two. A subgroup of 64 is two of 32, of which an inactive one is skipped.
//! - Apple M1 (family 7): Apple documents nothing, and those who measured found it narrow without saying how many banks
//!   there are (<https://github.com/philipturner/metal-benchmarks>; its issue 2 takes them for 16). Assumed: 16 banks,
//!   so 64 bytes per cycle and core, and phases of 16 lanes of 4 bytes, 8 of 8 and 4 of 16.
//! - Qualcomm Adreno: nothing is public. Assumed: as Apple's, the narrowest of the others.

use crate::compile::trace::Trace;

/// Bytes of a bank's word.
const WORD: u32 = 4;

/// Lanes that are served together, whatever the subgroup.
const LANES: usize = 32;

/// How an architecture serves accesses of workgroup memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Name of the architecture, such as `rdna3`.
    pub name: &'static str,
    /// Banks that serve a word per cycle each: of a compute unit (AMD), a streaming multiprocessor (NVIDIA), a core.
    pub banks: u32,
    /// Schedulers (SIMDs, partitions of a multiprocessor) that share these banks.
    pub schedulers: u32,
    /// Bytes of the widest access that the compiler makes: wider ones are split. 16 unless set by
    /// [`Rules::with_widest`].
    pub widest: u32,
    /// What is assumed because nobody documents it; empty where there are sources for all that matters.
    pub assumed: &'static str,
    /// Whether loads of 8 and 16 bytes take half as many phases where pairs of lanes read the same.
    pairs: bool,
    /// Whether the lanes of a phase of a 16-byte load may be others than eight neighbours.
    mixed: bool,
}

impl Rules {
    /// NVIDIA, compute capability 8.x: Ampere.
    pub const AMPERE: Self =
        Self { name: "ampere", banks: 32, schedulers: 4, widest: 16, assumed: "", pairs: true, mixed: false };
    /// NVIDIA, compute capability 8.9: Ada.
    pub const ADA: Self = Self { name: "ada", ..Self::AMPERE };
    /// AMD, gfx103x.
    pub const RDNA2: Self = Self {
        name: "rdna2",
        banks: 32,
        schedulers: 2,
        widest: 16,
        assumed: "which lanes share a phase of a 16-byte load: the worse of neighbours and CDNA's",
        pairs: false,
        mixed: true,
    };
    /// AMD, gfx11xx.
    pub const RDNA3: Self = Self { name: "rdna3", ..Self::RDNA2 };
    /// AMD, gfx12xx.
    pub const RDNA4: Self = Self { name: "rdna4", assumed: "", mixed: false, ..Self::RDNA2 };
    /// Apple, family 7: M1.
    pub const APPLE: Self = Self {
        name: "apple-m1",
        banks: 16,
        schedulers: 4,
        widest: 16,
        assumed: "16 banks, and phases of 64 bytes of neighbouring lanes",
        pairs: false,
        mixed: false,
    };
    /// Qualcomm Adreno.
    pub const ADRENO: Self = Self {
        name: "adreno",
        schedulers: 2,
        assumed: "everything: 16 banks, and phases of 64 bytes of neighbouring lanes; two schedulers to a memory",
        ..Self::APPLE
    };

    /// All architectures.
    pub const ALL: [Self; 7] =
        [Self::AMPERE, Self::ADA, Self::RDNA2, Self::RDNA3, Self::RDNA4, Self::APPLE, Self::ADRENO];

    /// The same for a compiler that makes no access wider than so many bytes (4, 8 or 16). ACO reads 8 bytes at a time
    /// where it cannot prove an alignment of 16.
    pub const fn with_widest(self, bytes: u32) -> Self {
        Self { widest: bytes, ..self }
    }

    /// Passes of one access of `bytes` per lane by one subgroup, whose lanes have these byte addresses or take no part.
    ///
    /// ```
    /// use sparse24::compile::banks::Rules;
    /// // 32 lanes read neighbouring words, then words 32 apart, all of which lie in one bank.
    /// let lanes = |stride: u32| (0..32).map(|lane| Some(4 * stride * lane)).collect::<Vec<_>>();
    /// assert_eq!(Rules::ADA.passes(&lanes(1), 4, false), 1);
    /// assert_eq!(Rules::ADA.passes(&lanes(32), 4, false), 32);
    /// ```
    pub fn passes(&self, addresses: &[Option<u32>], bytes: u32, write: bool) -> u64 {
        let mut total = 0;
        let mut done = 0;
        // Powers of two, none wider than the compiler's widest.
        while done < bytes {
            let left = (bytes - done).min(self.widest.max(1));
            let piece = 1 << left.ilog2();
            for lanes in addresses.chunks(LANES) {
                total += self.piece(lanes, done, piece, write);
            }
            done += piece;
        }
        total
    }

    /// Passes of one instruction for up to 32 lanes, which starts so many bytes behind their addresses.
    fn piece(&self, lanes: &[Option<u32>], behind: u32, bytes: u32, write: bool) -> u64 {
        if lanes.iter().all(Option::is_none) {
            return 0;
        }
        let words = bytes.div_ceil(WORD);
        let phase = (self.banks / words).clamp(1, LANES as u32) as usize;
        let cost = |lanes: &[Option<u32>]| self.phase(lanes, behind, words);
        let neighbours = |phase: usize| lanes.chunks(phase).map(cost).sum::<u64>();
        if write || words == 1 {
            return neighbours(phase);
        }
        if self.pairs && (paired(lanes, 1) || paired(lanes, 2)) {
            return neighbours(2 * phase);
        }
        if self.mixed && words == 4 && lanes.len() == LANES {
            // Runs of four lanes that share a phase.
            let mixed = [(0, 5), (1, 4), (2, 7), (3, 6)].map(|(a, b)| {
                let run = |at: usize| &lanes[4 * at..4 * at + 4];
                cost(&[run(a), run(b)].concat())
            });
            return neighbours(phase).max(mixed.iter().sum());
        }
        neighbours(phase)
    }

    /// Passes of lanes that are served together: the most different words that one bank is asked for, at least one.
    fn phase(&self, lanes: &[Option<u32>], behind: u32, words: u32) -> u64 {
        let first = lanes.iter().flatten().map(|&at| (at + behind) / WORD);
        let mut asked: Vec<u32> = first.flat_map(|first| first..first + words).collect();
        asked.sort_unstable();
        asked.dedup();
        let in_bank = |bank: u32| asked.iter().filter(|&word| word % self.banks == bank).count() as u64;
        // As many different words as fit the banks, side by side, are the usual case.
        match (asked.first(), asked.last()) {
            (Some(&low), Some(&high)) if high - low < self.banks => 1,
            _ => (0..self.banks).map(in_bank).max().unwrap_or_default().max(1),
        }
    }

    /// Passes of everything that a workgroup did, cut into subgroups of so many lanes (32 or 64).
    pub fn total(&self, trace: &Trace, subgroup: usize) -> u64 {
        let mut total = 0;
        for (access, addresses) in trace.each() {
            let addresses: Vec<_> = addresses.collect();
            for lanes in addresses.chunks(subgroup.max(1)) {
                total += self.passes(lanes, access.bytes, access.write);
            }
        }
        total
    }
}

/// Whether lanes that differ in one bit of their number read the same, where both of them read.
fn paired(lanes: &[Option<u32>], bit: usize) -> bool {
    let partner = |lane: usize| lanes.get(lane ^ bit).copied().flatten();
    lanes.iter().enumerate().all(|(lane, &at)| at.is_none() || partner(lane).is_none_or(|other| at == Some(other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: [Rules; 5] = [Rules::AMPERE, Rules::ADA, Rules::RDNA2, Rules::RDNA3, Rules::RDNA4];
    const NARROW: [Rules; 2] = [Rules::APPLE, Rules::ADRENO];

    fn lanes(f: impl Fn(u32) -> u32) -> Vec<Option<u32>> {
        (0..32).map(|lane| Some(f(lane))).collect()
    }

    fn read(rules: Rules, bytes: u32, f: impl Fn(u32) -> u32) -> u64 {
        rules.passes(&lanes(f), bytes, false)
    }

    #[test]
    fn words_cost_what_their_worst_bank_is_asked_for() {
        for rules in WIDE {
            // One word for all; neighbours; strides of 2, 3, 4, 32 and 33 words.
            assert_eq!(read(rules, 4, |_| 96), 1, "{}", rules.name);
            for (stride, passes) in [(1, 1), (2, 2), (3, 1), (4, 4), (32, 32), (33, 1)] {
                assert_eq!(read(rules, 4, |lane| 4 * stride * lane), passes, "{}: {stride}", rules.name);
            }
            // Two halves of a word are one word.
            assert_eq!(read(rules, 2, |lane| 2 * lane), 1);
            // Two different words of one bank, 16 lanes each.
            assert_eq!(read(rules, 4, |lane| lane / 16 * 128), 2);
        }
        for rules in NARROW {
            // 32 words are two phases, and a bank that all lanes of a phase want gives one word per pass.
            for (stride, passes) in [(0, 2), (1, 2), (2, 4), (16, 32), (17, 2)] {
                assert_eq!(read(rules, 4, |lane| 4 * stride * lane), passes, "{}: {stride}", rules.name);
            }
        }
    }

    #[test]
    fn wide_accesses_go_by_phases() {
        for rules in WIDE {
            // 256 and 512 bytes at 128 per pass.
            assert_eq!(read(rules, 8, |lane| 8 * lane), 2, "{}", rules.name);
            assert_eq!(read(rules, 16, |lane| 16 * lane), 4, "{}", rules.name);
            assert_eq!(rules.passes(&lanes(|lane| 16 * lane), 16, true), 4);
            // Every lane in the same four banks: as many passes as lanes.
            assert_eq!(read(rules, 16, |lane| 128 * lane), 32);
            // 12 bytes are 8 and 4.
            let apart = read(rules, 8, |lane| 12 * lane) + read(rules, 4, |lane| 12 * lane + 8);
            assert_eq!(read(rules, 12, |lane| 12 * lane), apart);
        }
        for rules in NARROW {
            assert_eq!((read(rules, 8, |lane| 8 * lane), read(rules, 16, |lane| 16 * lane)), (4, 8));
        }
    }

    #[test]
    fn what_all_lanes_share_still_goes_back_to_each_of_them() {
        // NVIDIA packs pairs of lanes that read the same; AMD and Apple are not known to.
        assert_eq!((read(Rules::ADA, 16, |_| 0), read(Rules::ADA, 8, |_| 0)), (2, 1));
        assert_eq!((read(Rules::RDNA3, 16, |_| 0), read(Rules::RDNA3, 8, |_| 0)), (4, 2));
        assert_eq!(read(Rules::APPLE, 16, |_| 0), 8);
        // Pairs in bit 0, in bit 1, and in neither: eight addresses, four lanes each.
        assert_eq!(read(Rules::ADA, 16, |lane| lane / 4 * 16), 2);
        assert_eq!(read(Rules::ADA, 16, |lane| (lane / 4 * 2 + lane % 2) * 16), 2);
        assert_eq!(read(Rules::ADA, 16, |lane| lane % 8 * 16), 4);
        // Stores are never packed.
        assert_eq!(Rules::ADA.passes(&lanes(|_| 0), 16, true), 4);
    }

    #[test]
    fn lanes_of_a_phase_are_neighbours_since_rdna4() {
        // Eight neighbours fill the banks once; CDNA's first phase, lanes 0 to 3 and 20 to 23, meets in half of them.
        let half = |lane: u32| 16 * (lane % 8) + 256 * (lane / 8);
        assert_eq!((read(Rules::RDNA4, 16, half), read(Rules::RDNA3, 16, half)), (4, 4));
        let clash = |lane: u32| 16 * (lane % 4) + 64 * ((lane / 4 % 2) ^ (lane / 16)) + 256 * (lane / 8);
        assert_eq!((read(Rules::RDNA4, 16, clash), read(Rules::RDNA3, 16, clash)), (4, 8));
    }

    #[test]
    fn a_split_access_may_conflict_where_a_whole_one_does_not() {
        let rules = Rules::RDNA3.with_widest(8);
        // Halves of neighbouring 16 bytes: 16 lanes meet in half of the banks, twice.
        assert_eq!((read(Rules::RDNA3, 16, |lane| 16 * lane), read(rules, 16, |lane| 16 * lane)), (4, 8));
        // Eight addresses for all: each half of 16 lanes asks every second pair of banks for one word.
        assert_eq!((read(Rules::RDNA3, 16, |lane| lane % 8 * 16), read(rules, 16, |lane| lane % 8 * 16)), (4, 4));
    }

    #[test]
    fn lanes_that_take_no_part_cost_nothing_by_the_32() {
        let mut some = vec![None; 64];
        assert_eq!(Rules::RDNA3.passes(&some, 4, false), 0);
        some[3] = Some(0);
        assert_eq!((Rules::RDNA3.passes(&some, 4, false), Rules::RDNA3.passes(&some, 16, false)), (1, 4));
        some[40] = Some(4096);
        assert_eq!(Rules::RDNA3.passes(&some, 4, false), 2);
    }
}
