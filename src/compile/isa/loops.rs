//! Loops of machine code, whatever its dialect: natural loops by dominators, and how often each block runs.
//!
//! Compilers lay blocks out as they like: a loop's test may stand at its end, and what leaves it within. So nothing
//! here depends on the order of blocks but for the first, where code begins.

use std::collections::HashMap;

use super::{Block, Loop};

/// Blocks of one loop, by the block that all its rounds begin with.
#[derive(Debug)]
struct Body {
    header: usize,
    members: Vec<bool>,
}

impl Body {
    fn size(&self) -> usize {
        self.members.iter().filter(|&&m| m).count()
    }
}

/// The loops of blocks, weighted, as the inner loops of the whole.
pub(super) fn loops(blocks: &[Block]) -> Loop {
    let next: Vec<&[usize]> = blocks.iter().map(|b| b.successors.as_slice()).collect();
    let bodies = bodies(&next);
    let once = once_through(&next, &bodies);
    let order = from_above(&once);
    let shares = shares(blocks, &once, &order);
    // Loops in the order of the code, each in the smallest that holds it; `bodies` are sorted by size.
    let place: HashMap<usize, usize> = order.iter().enumerate().map(|(place, &block)| (block, place)).collect();
    let holds = |outer: usize, inner: usize| outer > inner && bodies[outer].members[bodies[inner].header];
    let parent = |inner: usize| (inner + 1..bodies.len()).find(|&outer| holds(outer, inner));
    fn build(
        of: Option<usize>,
        (blocks, bodies, shares): (&[Block], &[Body], &[f64]),
        parent: &dyn Fn(usize) -> Option<usize>,
        place: &HashMap<usize, usize>,
    ) -> Loop {
        let mut whole = Loop::default();
        // A loop counts from its header's share: once in for each time that it is met.
        let met = of.map_or(1.0, |l| shares[bodies[l].header]);
        for (at, block) in blocks.iter().enumerate() {
            let innermost = bodies.iter().position(|body| body.members[at]);
            if innermost == of && shares[at] > 0.0 {
                for &class in &block.instructions {
                    whole.counts.add(class, shares[at] / met);
                }
            }
        }
        let mut inner: Vec<usize> = (0..bodies.len()).filter(|&l| parent(l) == of).collect();
        inner.sort_by_key(|&l| place.get(&bodies[l].header));
        whole.inner = inner.into_iter().map(|l| build(Some(l), (blocks, bodies, shares), parent, place)).collect();
        whole
    }
    build(None, (blocks, &bodies, &shares), &parent, &place)
}

/// Blocks that are reached, each before those that it leads to unless an edge goes back.
fn from_above<T: AsRef<[usize]>>(next: &[T]) -> Vec<usize> {
    let mut seen = vec![false; next.len()];
    let mut order = Vec::new();
    let mut stack = Vec::new();
    if !next.is_empty() {
        seen[0] = true;
        stack.push((0, 0));
    }
    while let Some((block, edge)) = stack.pop() {
        match next[block].as_ref().get(edge) {
            Some(&to) => {
                stack.push((block, edge + 1));
                if !seen[to] {
                    seen[to] = true;
                    stack.push((to, 0));
                }
            }
            None => order.push(block),
        }
    }
    order.reverse();
    order
}

/// The block through which all ways to a block lead last, for each block but the first; by places in `order`.
fn dominators<T: AsRef<[usize]>>(next: &[T], order: &[usize]) -> Vec<usize> {
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); order.len()];
    for (at, &block) in order.iter().enumerate() {
        next[block].as_ref().iter().for_each(|&to| before[place[to]].push(at));
    }
    // Edges that go back are met again until nothing changes.
    let mut above = vec![usize::MAX; order.len()];
    if let Some(first) = above.first_mut() {
        *first = 0;
    }
    let mut changed = true;
    while changed {
        changed = false;
        for at in 1..order.len() {
            let known = before[at].iter().copied().filter(|&b| above[b] != usize::MAX);
            let meet = known.reduce(|mut a, mut b| {
                while a != b {
                    if a > b { a = above[a] } else { b = above[b] }
                }
                a
            });
            let meet = meet.unwrap_or(0);
            changed |= above[at] != meet;
            above[at] = meet;
        }
    }
    above
}

/// Natural loops, smallest first.
fn bodies(next: &[&[usize]]) -> Vec<Body> {
    let order = from_above(next);
    let above = dominators(next, &order);
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    let dominates = |header: usize, mut at: usize| {
        while at > header {
            at = above[at];
        }
        at == header
    };
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); next.len()];
    for &block in &order {
        next[block].iter().for_each(|&to| before[to].push(block));
    }
    let mut found: Vec<Body> = Vec::new();
    for &block in &order {
        for &header in next[block].iter().filter(|&&to| dominates(place[to], place[block])) {
            let known = found.iter().position(|body| body.header == header).unwrap_or_else(|| {
                let mut members = vec![false; next.len()];
                members[header] = true;
                found.push(Body { header, members });
                found.len() - 1
            });
            let members = &mut found[known].members;
            let mut stack = vec![block];
            while let Some(at) = stack.pop() {
                if !std::mem::replace(&mut members[at], true) {
                    stack.extend(&before[at]);
                }
            }
        }
    }
    found.sort_by_key(Body::size);
    found
}

/// The edges once every loop runs once: none goes back, a loop is left from its end alone.
fn once_through(next: &[&[usize]], bodies: &[Body]) -> Vec<Vec<usize>> {
    let innermost = |block: usize| bodies.iter().find(|body| body.members[block]);
    (0..next.len())
        .map(|at| {
            let Some(body) = innermost(at) else { return next[at].to_vec() };
            let goes_back = |to: usize| bodies.iter().any(|b| b.header == to && b.members[at]);
            let ahead: Vec<usize> = next[at].iter().copied().filter(|&to| !goes_back(to)).collect();
            let stays: Vec<usize> = ahead.iter().copied().filter(|&to| body.members[to]).collect();
            if !stays.is_empty() {
                return stays;
            }
            // The end of the loop: on to where its blocks lead outside, within the loop around it if there is one.
            let members = (0..next.len()).filter(|&b| body.members[b]);
            let mut out: Vec<usize> =
                members.flat_map(|b| next[b].iter().copied()).filter(|&to| !body.members[to]).collect();
            let around = bodies.iter().find(|b| b.members[body.header] && b.header != body.header);
            if let Some(around) = around {
                let within: Vec<usize> =
                    out.iter().copied().filter(|&to| around.members[to] && to != around.header).collect();
                match within.is_empty() {
                    false => out = within,
                    true => out.retain(|&to| to != around.header),
                }
            }
            out.sort_unstable();
            out.dedup();
            out
        })
        .collect()
}

/// How often each block runs for once through the whole, if every loop ran once.
fn shares(blocks: &[Block], next: &[Vec<usize>], order: &[usize]) -> Vec<f64> {
    let end = order.len();
    let mut place = vec![usize::MAX; next.len()];
    order.iter().enumerate().for_each(|(at, &block)| place[block] = at);
    // Where all ways on from a block meet, by place; `end` is the end.
    let mut meets = vec![end; end + 1];
    for at in (0..end).rev() {
        let schedules = next[order[at]].iter().map(|&to| place[to]).filter(|&to| to > at);
        meets[at] = schedules
            .reduce(|mut a, mut b| {
                while a != b {
                    if a < b { a = meets[a] } else { b = meets[b] }
                }
                a
            })
            .unwrap_or(end);
    }
    let above = dominators(next, order);
    let mut shares = vec![0.0; blocks.len()];
    for at in 0..end {
        if at == 0 {
            shares[order[0]] = 1.0;
            continue;
        }
        let from = above[at];
        let always = std::iter::successors(Some(from), |&b| (b < end).then(|| meets[b])).any(|b| b == at);
        let branch = &blocks[order[from]];
        let sides = &next[order[from]];
        let skipped = sides.iter().any(|&to| place[to] == meets[from]) && !branch.alternative;
        let idle = |side: usize| !blocks[side].works() && next[side].len() == 1 && place[next[side][0]] == meets[from];
        let whole = always || skipped || sides.iter().any(|&to| place[to] != at && idle(to));
        shares[order[at]] = shares[order[from]] * if whole { 1.0 } else { 0.5 };
    }
    shares
}
