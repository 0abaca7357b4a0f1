// Filters of the samples.
const selects = [...document.querySelectorAll("select[data-by]")], samples = [...document.querySelectorAll("#samples article")];
const filterSamples = () => {
  samples.forEach((each) => { each.hidden = selects.some((by) => by.value && each.dataset[by.dataset.by] !== by.value); });
  document.getElementById("shown").textContent = `${samples.filter((each) => !each.hidden).length} shown`;
};
selects.forEach((each) => each.addEventListener("change", filterSamples));
if (samples.length) filterSamples();
