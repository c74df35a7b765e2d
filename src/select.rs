//! Which layers to prune, and how long a vector each can stand: by what a model may lose, or by how fast it must be.
//!
//! What goes in was measured layer by layer: what the model loses when one layer alone is pruned, and how long that
//! layer takes. Nothing is measured here but through the caller's callback, and nothing here knows what the metric is:
//! a *drop* is how much lower it is than the dense model's, so that a negative one is a gain.
//!
//! Layers are measured alone and pruned together, and what they lose does not simply add up. [`within_drop`] therefore
//! uses the single drops for the order alone and measures what is chosen; [`for_speedup`] adds them up, and its drop is
//! an estimate until the caller measures it.
//!
//! Invariant: every layer that was measured is in the answer, in the order in which it came, with the reason why it got
//! what it got.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::mask::VectorLen;

/// A layer in one form, dense or pruned to a pattern, with its drop and its time.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Name of the layer.
    pub layer: String,
    /// How many rows share a pattern; `None` is the dense layer.
    pub vector: Option<VectorLen>,
    /// How much lower the metric is with this layer alone in this form; 0 for the dense layer.
    pub drop: f64,
    /// Whether the drop is too small for the number of texts to tell it from none. It is used as it is all the same;
    /// reasons mention it.
    pub within_noise: bool,
    /// Weights of the layer, before pruning.
    pub weights: usize,
    /// How long the layer takes in this form, if that was measured.
    pub seconds: Option<f64>,
}

impl Candidate {
    /// The drop as reasons quote it.
    fn drop_text(&self) -> String {
        format!("{:.4}{}", self.drop, if self.within_noise { " (within noise)" } else { "" })
    }
}

/// What was chosen for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct SelectedLayer {
    /// Name of the layer.
    pub layer: String,
    /// The pattern to prune it to; `None` leaves it dense.
    pub vector: Option<VectorLen>,
    /// The drop with this layer alone.
    pub drop: f64,
    /// Why, for people: `V=32: 0.410 ms less for a drop of 0.0003`.
    pub reason: String,
}

/// What was chosen for all layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Every layer, in the order in which they came.
    pub layers: Vec<SelectedLayer>,
    /// The drop of all of them: with [`within_drop`] measured together, with [`for_speedup`] the sum of the single
    /// drops.
    pub drop: f64,
    /// The predicted time of a forward pass, with [`for_speedup`] only.
    pub seconds: Option<f64>,
    /// Whether what was asked for is reached; where it is not, this is the nearest to it.
    pub reached: bool,
    /// The whole in a sentence, for people.
    pub summary: String,
}

impl Selection {
    /// The layers to prune, with their patterns.
    pub fn vectors(&self) -> BTreeMap<&str, VectorLen> {
        self.layers.iter().filter_map(|choice| Some((choice.layer.as_str(), choice.vector?))).collect()
    }
}

/// Prunes as many layers as the model can stand: the least harmful ones, as long as their joint drop is at most
/// `max_drop`.
///
/// 1. *One pattern for each layer.* Its share of `max_drop` is its share of the weights. Of the patterns whose own drop
///    is at most that share, the fastest is taken (of equally fast or unmeasured ones the longest vector); if there is
///    none, the pattern with the least drop.
/// 2. *An order.* Layers are ordered by harm: drop per weight.
/// 3. *How many.* The longest prefix of that order whose joint drop, as `joint` measures it, is at most `max_drop`: all
///    layers first, then bisection, assuming that pruning more layers never lowers the drop. The last prefix that
///    passed is the answer, so that what is returned was measured; without any layer the drop is 0.
///
/// An error if `max_drop` is negative or NaN, a candidate's drop is not finite, its time is not finite or negative, or
/// two candidates are the same; or `joint`'s own.
///
/// ```
/// use sparse24::VectorLen;
/// use sparse24::select::{Candidate, within_drop};
/// let alone = [("a", 0.001), ("b", 0.02), ("c", 0.003)];
/// let candidates = alone.map(|(layer, drop)| Candidate {
///     layer: layer.into(),
///     vector: Some(VectorLen::ONE),
///     drop,
///     within_noise: false,
///     weights: 100,
///     seconds: None,
/// });
/// // A real one prunes the layers and evaluates the model; here they lose twice what they lose alone.
/// let joint = |picked: &std::collections::BTreeMap<&str, VectorLen>| -> sparse24::Result<f64> {
///     Ok(alone.iter().filter(|(layer, _)| picked.contains_key(layer)).map(|(_, drop)| 2.0 * drop).sum())
/// };
/// let chosen = within_drop(&candidates, 0.01, joint)?;
/// assert_eq!(chosen.vectors().into_keys().collect::<Vec<_>>(), ["a", "c"]);
/// assert_eq!(chosen.drop, 0.008);
/// # Ok::<(), sparse24::Error>(())
/// ```
pub fn within_drop<E: From<Error>>(
    candidates: &[Candidate],
    max_drop: f64,
    mut joint: impl FnMut(&BTreeMap<&str, VectorLen>) -> std::result::Result<f64, E>,
) -> std::result::Result<Selection, E> {
    if max_drop.is_nan() || max_drop < 0.0 {
        return Err(Error::invalid(format!("a drop of at most {max_drop}: it must be 0 or more")).into());
    }
    let layers = layers(candidates)?;
    let all: usize = layers.iter().map(|layer| layer.weights).sum();
    let mut ranked: Vec<RankedLayer<'_>> = layers
        .iter()
        .enumerate()
        .filter_map(|(at, layer)| {
            let share = max_drop * layer.weights as f64 / all.max(1) as f64;
            let pruned = layer.pruned.iter().copied();
            let harmless = pruned.clone().filter(|c| c.drop <= share).min_by(|a, b| faster(a, b));
            let candidate = harmless.or_else(|| pruned.min_by(|a, b| a.drop.total_cmp(&b.drop)))?;
            Some(RankedLayer { at, candidate, harmless: harmless.is_some(), share })
        })
        .collect();
    ranked.sort_by(|a, b| a.harm().total_cmp(&b.harm()));

    let mut measure = |count: usize| {
        let picked = ranked[..count].iter().filter_map(|s| Some((s.candidate.layer.as_str(), s.candidate.vector?)));
        match joint(&picked.collect())? {
            drop if drop.is_nan() => Err(Error::invalid(format!("the drop of {count} layers is NaN")).into()),
            drop => Ok::<_, E>(drop),
        }
    };
    // The longest prefix that passed, and the shortest that did not.
    let mut passed = (0, 0.0);
    let mut failed = None;
    let mut next = ranked.len();
    while next > passed.0 {
        let drop = measure(next)?;
        if drop <= max_drop {
            passed = (next, drop);
        } else {
            failed = Some((next, drop));
        }
        next = failed.map_or(passed.0, |(above, _)| (passed.0 + above) / 2);
    }

    let (taken, drop) = passed;
    let mut choices: Vec<SelectedLayer> =
        layers.iter().map(|layer| layer.stays("no pattern of it was measured")).collect();
    for (place, layer) in ranked.iter().enumerate() {
        let alone = format!("would lose {} alone", layer.candidate.drop_text());
        choices[layer.at] = match failed {
            _ if place < taken => layer.choice(),
            Some((1, drop)) if place == 0 => {
                let again = format!("measured again by itself it loses {drop:.4}, more than {max_drop}");
                layers[layer.at].stays(&format!("{alone}; {again}"))
            }
            Some((count, drop)) if count == place + 1 => layers[layer.at]
                .stays(&format!("{alone}, and with the layers less harmful than it {drop:.4}, more than {max_drop}")),
            _ if taken == 0 => {
                layers[layer.at].stays(&format!("{alone}; not even the least harmful layer fits into {max_drop}"))
            }
            _ => layers[layer.at].stays(&format!("{alone}, more for its weights than those that are pruned")),
        };
    }
    let summary = format!(
        "{taken} of {} layers are pruned, {:.0} % of the weights in them: together they lose {drop:.4}, at most \
         {max_drop} was asked for",
        layers.len(),
        percent(ranked[..taken].iter().map(|s| s.candidate.weights).sum(), all),
    );
    Ok(Selection { layers: choices, drop, seconds: None, reached: true, summary })
}

/// Prunes the layers that buy most time for least loss, until a forward pass is predicted to be `speedup` times as fast
/// as the dense one, which takes `forward` seconds: the greedy choice of NetAdapt (Yang et al. 2018,
/// [arXiv:1804.03230](https://arxiv.org/abs/1804.03230)), whose times are measured on the device, too, and added up.
///
/// Each step makes one layer faster than it is so far, by pruning it or by another pattern: the step that loses least
/// for each second that it gains, where a step that loses nothing counts as free and the larger gain decides. Patterns
/// that are not faster than the dense layer are never taken. Once the time is reached, layers without which it is
/// still reached are given back, those with the largest drop first. If it cannot be reached, all that gains is taken,
/// and [`Selection::reached`] is false.
///
/// Every layer needs a candidate for its dense form, and every candidate a time; otherwise that is an error, and so are
/// the numbers that [`within_drop`] refuses.
pub fn for_speedup(candidates: &[Candidate], forward: f64, speedup: f64) -> Result<Selection> {
    for (what, x) in [("a forward pass of {} s", forward), ("a speedup of {}", speedup)] {
        if !(x.is_finite() && x > 0.0) {
            return Err(Error::invalid(format!("{}: it must be above 0", what.replace("{}", &x.to_string()))));
        }
    }
    let layers = layers(candidates)?;
    let timed: Vec<Timed<'_>> = layers.iter().map(Timed::new).collect::<Result<_>>()?;
    let target = forward / speedup;
    // The candidate that each layer has so far.
    let mut now: Vec<Option<&Candidate>> = vec![None; layers.len()];
    let gained = |now: &[Option<&Candidate>]| -> f64 { timed.iter().zip(now).map(|(t, c)| t.gain(*c)).sum() };
    while forward - gained(&now) > target {
        let steps = timed.iter().zip(&now).enumerate().flat_map(|(at, (timed, now))| {
            let (gain, drop) = (timed.gain(*now), now.map_or(0.0, |c| c.drop));
            let faster = timed.layer.pruned.iter().map(move |&c| (at, c, timed.gain(Some(c)) - gain, c.drop - drop));
            faster.filter(|(.., gain, _)| *gain > 0.0)
        });
        let rate = |gain: f64, drop: f64| drop.max(0.0) / gain;
        let best = steps.min_by(|(.., gain, drop), (.., other, its)| {
            rate(*gain, *drop).total_cmp(&rate(*other, *its)).then(other.total_cmp(gain))
        });
        let Some((at, candidate, ..)) = best else { break };
        now[at] = Some(candidate);
    }
    let reached = forward - gained(&now) <= target;
    if reached {
        let mut by_drop: Vec<(usize, f64)> =
            now.iter().enumerate().filter_map(|(at, c)| Some((at, c.as_ref()?.drop))).collect();
        by_drop.retain(|(_, drop)| *drop > 0.0);
        by_drop.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (at, _) in by_drop {
            let kept = now[at].take();
            if forward - gained(&now) > target {
                now[at] = kept;
            }
        }
    }

    let choices = timed.iter().zip(&now).map(|(timed, now)| timed.choice(*now, speedup)).collect();
    let seconds = forward - gained(&now);
    if seconds <= 0.0 {
        let gained = ms(gained(&now));
        return Err(Error::invalid(format!("layers would save {gained} of a forward pass of {}", ms(forward))));
    }
    let drop = now.iter().flatten().map(|c| c.drop).sum();
    let (taken, count) = (now.iter().flatten().count(), layers.len());
    let times = format!("{} of {} remain, {:.2}x as fast", ms(seconds), ms(forward), forward / seconds);
    let summary = match reached {
        true => format!("{taken} of {count} layers are pruned: {times}; the drops of each alone add up to {drop:.4}"),
        false => {
            format!("{speedup}x cannot be reached: with the {taken} of {count} layers that gain by it pruned, {times}")
        }
    };
    Ok(Selection { layers: choices, drop, seconds: Some(seconds), reached, summary })
}

/// A layer with everything that was measured of it.
struct Layer<'a> {
    name: &'a str,
    weights: usize,
    dense: Option<&'a Candidate>,
    pruned: Vec<&'a Candidate>,
}

impl Layer<'_> {
    fn stays(&self, why: &str) -> SelectedLayer {
        SelectedLayer { layer: self.name.to_owned(), vector: None, drop: 0.0, reason: format!("stays dense: {why}") }
    }
}

/// The candidates by layer, checked.
fn layers(candidates: &[Candidate]) -> Result<Vec<Layer<'_>>> {
    let mut layers: Vec<Layer<'_>> = Vec::new();
    let mut places = BTreeMap::new();
    for candidate in candidates {
        let Candidate { layer: name, vector, drop, weights, seconds, .. } = candidate;
        if !drop.is_finite() {
            return Err(Error::invalid(format!("{}: the drop is {drop}; it must be finite", form(name, *vector))));
        }
        if let Some(s) = seconds.filter(|s| !(s.is_finite() && *s >= 0.0)) {
            let form = form(name, *vector);
            return Err(Error::invalid(format!("{form}: the time is {s} s; it must be finite and not negative")));
        }
        let at = *places.entry(name.as_str()).or_insert(layers.len());
        if at == layers.len() {
            layers.push(Layer { name, weights: *weights, dense: None, pruned: Vec::new() });
        }
        let layer = &mut layers[at];
        let known = match vector {
            None => layer.dense.replace(candidate).is_some(),
            Some(_) => {
                layer.pruned.push(candidate);
                layer.pruned.iter().filter(|c| c.vector == *vector).count() > 1
            }
        };
        if known {
            return Err(Error::invalid(format!("{} is there twice", form(name, *vector))));
        }
        if layer.weights != *weights {
            return Err(Error::invalid(format!("{name} has {} weights, then {weights}", layer.weights)));
        }
    }
    Ok(layers)
}

fn form(layer: &str, vector: Option<VectorLen>) -> String {
    vector.map_or_else(|| format!("{layer}, dense"), |v| format!("{layer} at V={v}"))
}

/// The faster one first; without two times, or of equal ones, the longer vector.
fn faster(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    let times = a.seconds.zip(b.seconds).map_or(std::cmp::Ordering::Equal, |(a, b)| a.total_cmp(&b));
    times.then(b.vector.cmp(&a.vector))
}

/// A layer in the pattern that [`within_drop`] chose for it, to be ordered by harm.
struct RankedLayer<'a> {
    /// Its place in the list of layers.
    at: usize,
    candidate: &'a Candidate,
    /// Whether its own drop is at most its share.
    harmless: bool,
    /// Its share of the largest drop that is allowed.
    share: f64,
}

impl RankedLayer<'_> {
    fn harm(&self) -> f64 {
        self.candidate.drop / self.candidate.weights.max(1) as f64
    }

    fn choice(&self) -> SelectedLayer {
        let Self { candidate, harmless, share, .. } = self;
        let Candidate { layer, vector, drop, .. } = candidate;
        let share = match harmless {
            true => format!("within its share of {share:.4}"),
            false => format!("above its share of {share:.4}, which others leave unused"),
        };
        let vector_name = vector.map_or_else(String::new, |v| format!("V={v}: "));
        let reason = format!("{vector_name}loses {} alone, {share}", candidate.drop_text());
        SelectedLayer { layer: layer.clone(), vector: *vector, drop: *drop, reason }
    }
}

/// A layer of which all times are known.
struct Timed<'a> {
    layer: &'a Layer<'a>,
    dense: f64,
}

impl<'a> Timed<'a> {
    fn new(layer: &'a Layer<'a>) -> Result<Self> {
        let dense = layer.dense.and_then(|c| c.seconds);
        if let Some(c) = layer.pruned.iter().find(|c| c.seconds.is_none()) {
            return Err(Error::invalid(format!("{} was not timed", form(layer.name, c.vector))));
        }
        let dense = dense.ok_or_else(|| Error::invalid(format!("{} was not timed", form(layer.name, None))))?;
        Ok(Self { layer, dense })
    }

    /// Seconds that a form takes less than the dense layer.
    fn gain(&self, candidate: Option<&Candidate>) -> f64 {
        candidate.and_then(|c| c.seconds).map_or(0.0, |seconds| self.dense - seconds)
    }

    fn choice(&self, chosen: Option<&Candidate>, speedup: f64) -> SelectedLayer {
        if let Some(candidate @ &Candidate { vector: Some(v), drop, .. }) = chosen {
            let reason = format!("V={v}: {} less for a drop of {}", ms(self.gain(chosen)), candidate.drop_text());
            return SelectedLayer { layer: self.layer.name.to_owned(), vector: Some(v), drop, reason };
        }
        let gain = |c: &&&Candidate| self.gain(Some(**c));
        let best = self.layer.pruned.iter().max_by(|a, b| gain(a).total_cmp(&gain(b)));
        self.layer.stays(&match best {
            None => "no pattern of it was measured".to_owned(),
            Some(c) if gain(&c) > 0.0 => {
                format!("{} less would lose {}, and {speedup}x is reached without it", ms(gain(&c)), c.drop_text())
            }
            Some(c) if gain(&c) < 0.0 => format!("2:4 takes {} more", ms(-gain(&c))),
            Some(_) => "no pattern is faster".to_owned(),
        })
    }
}

fn ms(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}

fn percent(part: usize, all: usize) -> f64 {
    100.0 * part as f64 / all.max(1) as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const ALL: VectorLen = VectorLen::ALL[5];

    fn candidate(layer: &str, v: Option<VectorLen>, drop: f64, weights: usize, seconds: Option<f64>) -> Candidate {
        Candidate { layer: layer.into(), vector: v, drop, within_noise: false, weights, seconds }
    }

    /// Layers of 100 weights that are measured at V = 1 only.
    fn ones(drops: &[(&str, f64)]) -> Vec<Candidate> {
        drops.iter().map(|&(layer, drop)| candidate(layer, Some(VectorLen::ONE), drop, 100, None)).collect()
    }

    /// What is chosen, and which prefixes were measured in which order.
    fn within(
        candidates: &[Candidate],
        most: f64,
        joint: impl Fn(&BTreeMap<&str, VectorLen>) -> f64,
    ) -> (Selection, Vec<String>) {
        let mut asked = Vec::new();
        let chosen = within_drop(candidates, most, |picked| {
            asked.push(picked.keys().copied().collect::<String>());
            Ok::<_, Error>(joint(picked))
        });
        (chosen.unwrap(), asked)
    }

    fn names(chosen: &Selection) -> String {
        chosen.vectors().into_keys().collect()
    }

    fn reason<'a>(chosen: &'a Selection, layer: &str) -> &'a str {
        &chosen.layers.iter().find(|c| c.layer == layer).unwrap().reason
    }

    #[test]
    fn all_layers_are_taken_after_one_measurement_if_they_may_be() {
        let (chosen, asked) = within(&ones(&[("a", 0.5), ("b", 0.1)]), 0.2, |_| 0.2);
        assert_eq!((names(&chosen).as_str(), chosen.drop, asked), ("ab", 0.2, vec!["ab".to_owned()]));
        assert!(chosen.reached && chosen.summary.starts_with("2 of 2 layers are pruned, 100 %"), "{}", chosen.summary);
    }

    /// The joint drops decide, not the sum of the single ones: here it would allow none or all.
    #[test]
    fn the_longest_prefix_of_least_harmful_layers_that_passes_is_found() {
        let drops = [("a", 0.05), ("b", 0.01), ("c", 0.04), ("d", 0.02), ("e", 0.03), ("f", 0.06), ("g", 0.07)];
        let order = "bdecafg";
        for count in 0..=order.len() {
            let joint = |picked: &BTreeMap<&str, VectorLen>| if picked.len() <= count { 0.009 } else { 0.011 };
            let (chosen, asked) = within(&ones(&drops), 0.01, joint);
            let mut expected: Vec<_> = order[..count].chars().collect();
            expected.sort_unstable();
            assert_eq!(names(&chosen), expected.iter().collect::<String>());
            assert_eq!(chosen.drop, if count == 0 { 0.0 } else { 0.009 });
            assert!(asked.len() <= 4, "{asked:?}");
            // In the order in which they came.
            assert_eq!(chosen.layers.iter().map(|c| c.layer.as_str()).collect::<String>(), "abcdefg");
            if let Some(next) = order.get(count..count + 1) {
                let text = reason(&chosen, next);
                let says = match count {
                    0 => "would lose 0.0100 alone; measured again by itself it loses 0.0110, more than 0.01",
                    _ => "alone, and with the layers less harmful than it 0.0110, more than 0.01",
                };
                assert!(text.ends_with(says), "{text}");
            }
            // Those after it.
            for other in order.chars().skip(count + 1) {
                let text = reason(&chosen, &other.to_string());
                let says = match count {
                    0 => "alone; not even the least harmful layer fits into 0.01",
                    _ => "alone, more for its weights than those that are pruned",
                };
                assert!(text.ends_with(says), "{text}");
            }
        }
    }

    #[test]
    fn harm_is_drop_for_each_weight() {
        let one = Some(VectorLen::ONE);
        let candidates = [candidate("a", one, 0.01, 10, None), candidate("b", one, 0.02, 100, None)];
        let (chosen, _) = within(&candidates, 0.02, |picked| 0.02 * picked.len() as f64);
        assert_eq!(names(&chosen), "b");
        assert_eq!(
            reason(&chosen, "a"),
            "stays dense: would lose 0.0100 alone, and with the layers less harmful than it \
                                          0.0400, more than 0.02"
        );
    }

    #[test]
    fn of_several_patterns_the_fastest_that_is_harmless_enough_is_taken() {
        let both = |one: (f64, Option<f64>), long: (f64, Option<f64>)| {
            let rest = candidate("b", None, 0.0, 100, None);
            let candidates = [
                candidate("a", Some(VectorLen::ONE), one.0, 100, one.1),
                candidate("a", Some(ALL), long.0, 100, long.1),
                rest,
            ];
            let (chosen, _) = within(&candidates, 0.02, |_| 0.0);
            assert_eq!(reason(&chosen, "b"), "stays dense: no pattern of it was measured");
            chosen.vectors()["a"].get()
        };
        // The layer's share is half of 0.02. Without times the longer one, with times the faster one.
        assert_eq!(both((0.001, None), (0.01, None)), 32);
        assert_eq!(both((0.001, Some(2.0)), (0.01, Some(1.0))), 32);
        assert_eq!(both((0.001, Some(1.0)), (0.01, Some(2.0))), 1);
        // Above the share: the less harmful one, however slow.
        assert_eq!(both((0.001, Some(2.0)), (0.011, Some(1.0))), 1);
        assert_eq!(both((0.012, None), (0.011, None)), 32);
    }

    #[test]
    fn what_is_no_number_or_there_twice_is_refused() {
        let most = |most| within_drop(&ones(&[("a", 0.1)]), most, |_| Ok::<_, Error>(0.0)).map(|c| names(&c));
        assert_eq!(most(0.0).unwrap(), "a");
        assert_eq!(most(-1.0).unwrap_err().to_string(), "a drop of at most -1: it must be 0 or more");
        assert!(most(f64::NAN).is_err());
        let refused = |candidates: &[Candidate]| {
            within_drop(candidates, 1.0, |_| Ok::<_, Error>(f64::NAN)).unwrap_err().to_string()
        };
        assert_eq!(refused(&ones(&[("a", f64::NAN)])), "a at V=1: the drop is NaN; it must be finite");
        let timed = |seconds| refused(&[candidate("a", None, 0.0, 100, Some(seconds))]);
        assert_eq!(timed(-1.0), "a, dense: the time is -1 s; it must be finite and not negative");
        assert_eq!(timed(f64::INFINITY), "a, dense: the time is inf s; it must be finite and not negative");
        assert_eq!(refused(&ones(&[("a", 0.1), ("a", 0.1)])), "a at V=1 is there twice");
        assert_eq!(refused(&ones(&[("a", 0.1)])), "the drop of 1 layers is NaN");
        let other = candidate("a", None, 0.0, 99, None);
        assert_eq!(refused(&[ones(&[("a", 0.1)]), vec![other]].concat()), "a has 100 weights, then 99");
    }

    /// A layer of 10 ms, with what it loses and takes (in ms) at V = 1 and V = 32.
    fn timed(layer: &str, one: (f64, f64), long: (f64, f64)) -> [Candidate; 3] {
        let at = |v, (drop, ms): (f64, f64)| candidate(layer, v, drop, 100, Some(ms / 1e3));
        [at(None, (0.0, 10.0)), at(Some(VectorLen::ONE), one), at(Some(ALL), long)]
    }

    #[test]
    fn the_steps_that_lose_least_for_their_time_are_taken_until_it_is_reached() {
        // b loses most, but least for each of the milliseconds that it gains.
        let candidates = [
            timed("a", (0.02, 9.0), (0.02, 9.5)),
            timed("b", (0.03, 11.0), (0.04, 4.0)),
            timed("c", (0.5, 6.0), (0.6, 6.0)),
        ];
        let of = |speedup| for_speedup(&candidates.concat(), 0.1, speedup).unwrap();
        let none = of(1.0);
        assert_eq!((names(&none).as_str(), none.seconds, none.reached), ("", Some(0.1), true));
        // Not two layers that lose less each, and gain less.
        let small = [timed("a", (0.02, 8.0), (0.02, 8.0)), timed("c", (0.021, 8.0), (0.021, 8.0))].concat();
        assert_eq!(names(&for_speedup(&[&small, &candidates[1][..]].concat(), 0.1, 100.0 / 96.0).unwrap()), "b");
        let some = of(100.0 / 95.0);
        assert_eq!((names(&some).as_str(), some.vectors()["b"]), ("b", ALL));
        assert_eq!(reason(&some, "b"), "V=32: 6.000 ms less for a drop of 0.0400");
        assert_eq!(
            reason(&some, "a"),
            format!("stays dense: 1.000 ms less would lose 0.0200, and {}x is reached without it", 100.0 / 95.0)
        );
        assert!((some.seconds.unwrap() - 0.094).abs() < 1e-12 && (some.drop - 0.04).abs() < 1e-12);
        let all = of(100.0 / 89.5);
        assert_eq!((names(&all).as_str(), all.reached, all.vectors()["c"]), ("abc", true, VectorLen::ONE));
        let most = of(1.2);
        assert_eq!((names(&most).as_str(), most.reached), ("abc", false));
        assert!(most.summary.starts_with("1.2x cannot be reached: with the 3 of 3"), "{}", most.summary);
        assert!(most.summary.ends_with("89.000 ms of 100.000 ms remain, 1.12x as fast"), "{}", most.summary);
    }

    #[test]
    fn a_pruned_layer_gets_a_faster_pattern_where_that_is_the_best_step() {
        let candidates = timed("a", (0.001, 8.0), (0.01, 5.0));
        assert_eq!(for_speedup(&candidates, 0.01, 1.25).unwrap().vectors()["a"], VectorLen::ONE);
        assert_eq!(for_speedup(&candidates, 0.01, 1.3).unwrap().vectors()["a"], ALL);
        // To go on from V = 1 loses 0.009 for 3 ms: 0.003 a ms, and b 0.0032.
        let both = [timed("a", (0.001, 8.0), (0.01, 5.0)), timed("b", (0.0032, 9.0), (0.1, 9.0))].concat();
        let chosen = for_speedup(&both, 0.02, 20.0 / 17.0).unwrap();
        assert_eq!((names(&chosen).as_str(), chosen.vectors()["a"]), ("a", ALL));
        // Free steps come first, the larger gain before the smaller one.
        let free = [timed("a", (-0.1, 9.0), (-0.1, 9.0)), timed("b", (0.0, 5.0), (0.0, 6.0))].concat();
        assert_eq!(names(&for_speedup(&free, 0.02, 1.01).unwrap()), "b");
    }

    /// a is the better step, but b, which is needed, makes up for it.
    #[test]
    fn what_is_not_needed_in_the_end_is_given_back() {
        let candidates = [timed("a", (0.01, 9.0), (0.01, 9.0)), timed("b", (0.09, 4.0), (0.09, 4.0))].concat();
        assert_eq!(names(&for_speedup(&candidates, 0.02, 20.0 / 15.0).unwrap()), "b");
        assert_eq!(names(&for_speedup(&candidates, 0.02, 20.0 / 13.5).unwrap()), "ab");
        // The most harmful of those that are not needed, and none that gains.
        let [a, c] = [timed("a", (0.01, 8.0), (0.01, 8.0)), timed("c", (0.012, 8.0), (0.012, 8.0))];
        let candidates = [&a[..], &c, &candidates[3..]].concat();
        assert_eq!(names(&for_speedup(&candidates, 0.03, 30.0 / 22.0).unwrap()), "ab");
        let candidates = [&timed("a", (-0.01, 9.0), (-0.01, 9.0)), &candidates[6..]].concat();
        assert_eq!(names(&for_speedup(&candidates, 0.02, 20.0 / 14.0).unwrap()), "ab");
    }

    #[test]
    fn reasons_say_which_drops_are_within_noise() {
        let noise = |candidates: &[Candidate]| -> Vec<Candidate> {
            let of = |c: &Candidate| Candidate { within_noise: c.layer == "a" && c.vector.is_some(), ..c.clone() };
            candidates.iter().map(of).collect()
        };
        let (chosen, _) = within(&noise(&ones(&[("a", 0.001), ("b", 0.01)])), 0.1, |_| 0.0);
        assert_eq!(reason(&chosen, "a"), "V=1: loses 0.0010 (within noise) alone, within its share of 0.0500");
        assert_eq!(reason(&chosen, "b"), "V=1: loses 0.0100 alone, within its share of 0.0500");
        let (none, _) = within(&noise(&ones(&[("a", 0.3)])), 0.1, |_| 0.2);
        assert!(reason(&none, "a").starts_with("stays dense: would lose 0.3000 (within noise) alone"));
        let both = noise(&[timed("a", (0.01, 8.0), (0.01, 8.0)), timed("b", (0.09, 4.0), (0.09, 4.0))].concat());
        let fast = for_speedup(&both, 0.02, 20.0 / 12.0).unwrap();
        assert_eq!(reason(&fast, "a"), "V=1: 2.000 ms less for a drop of 0.0100 (within noise)");
        let slow = for_speedup(&both, 0.02, 20.0 / 14.0).unwrap();
        assert!(reason(&slow, "a").contains("less would lose 0.0100 (within noise), and"), "{}", reason(&slow, "a"));
    }

    #[test]
    fn what_does_not_gain_stays_dense() {
        let slower = for_speedup(&timed("a", (0.0, 12.0), (0.0, 10.5)), 0.02, 2.0).unwrap();
        assert_eq!((names(&slower).as_str(), slower.reached), ("", false));
        assert_eq!(reason(&slower, "a"), "stays dense: 2:4 takes 0.500 ms more");
        let same = for_speedup(&timed("a", (0.0, 12.0), (0.0, 10.0)), 0.02, 2.0).unwrap();
        assert_eq!(reason(&same, "a"), "stays dense: no pattern is faster");
        let [dense, one, _] = timed("a", (0.0, 5.0), (0.0, 5.0));
        let refused =
            |candidates: &[Candidate], speedup| for_speedup(candidates, 0.02, speedup).unwrap_err().to_string();
        assert_eq!(refused(std::slice::from_ref(&one), 2.0), "a, dense was not timed");
        assert_eq!(refused(&[dense.clone(), Candidate { seconds: None, ..one }], 2.0), "a at V=1 was not timed");
        assert_eq!(refused(&[dense], 0.0), "a speedup of 0: it must be above 0");
        // A gain of 25 ms in a forward pass of 20: the times are not of one device and one shape.
        let apart = refused(
            &timed("a", (0.0, 0.0), (0.0, 0.0)).map(|c| Candidate { seconds: c.seconds.map(|s| 2.5 * s), ..c }),
            2.0,
        );
        assert_eq!(apart, "layers would save 25.000 ms of a forward pass of 20.000 ms");
    }
}
